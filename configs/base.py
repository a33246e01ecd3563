"""Every key with its default; the named configs beside this file change what they need.

Any key can be changed on the command line: --config.optim.steps=1000.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # parameters and the order of the data
    config.log_every = 10  # steps between lines of training metrics
    config.eval_every = 100  # steps between evaluations; 0: only at the end
    config.eval_batches = 16  # batches of the validation split per evaluation
    config.checkpoint_every = 100  # steps between checkpoints; the last step always has one
    config.checkpoints_kept = 2  # older ones are deleted
    config.heartbeat_timeout = 60  # seconds; when one of many processes is silent for so long, the others end

    config.mesh = mesh = ConfigDict()  # devices per axis; -1 in one of them: as many as there are
    mesh.data = -1  # groups that train on different sequences
    mesh.seq = 1  # devices that share a sequence
    mesh.model = 1  # devices that share a segment, and a layer's weights by heads and columns

    config.attention = attention = ConfigDict()
    attention.strategy = "lss"  # the paper's; or "ring", "ulysses"
    attention.layout = (
        "zigzag"  # early and late tokens on every device, for balance; "contiguous": the paper's segments
    )
    attention.window = 0  # a token sees so many, itself included; 0: all before it
    attention.prefix = 0  # the first so many tokens see one another, and are not predicted (prefix-LM)
    # The kernel: "blockwise", "dense" (the paper's l x L scores), "triton" (NVIDIA GPUs), "mosaic" (TPUs); "auto": a
    # fused one where the devices have it, else "blockwise".
    attention.kernel = "auto"
    attention.block_queries = 512  # at most, in a block; by measurement of "blockwise", experiments/attention
    attention.block_keys = 256
    attention.gather_groups = 1  # "lss": key/value heads travel in so many groups, while the one before is computed
    attention.regather = False  # move keys and values again on the way back instead of keeping them for every layer

    config.model = model = ConfigDict()
    model.family = "decoder"
    model.vocab = 256  # bytes
    model.layers = 4
    model.width = 128
    model.heads = 4
    model.kv_heads = model.get_oneway_ref("heads")  # fewer: query heads share keys and values (GQA, MQA)
    model.mlp_width = model.get_oneway_ref("width") * 4
    model.positions = "learned"  # "learned" (cut by segment), "sinusoidal", "rope" or "none"
    model.rope_base = 10_000.0
    model.rope_scaling = "none"  # for longer contexts: "linear" (positions / factor), "ntk" (a larger base)
    model.rope_factor = 1.0  # how many times longer
    model.tied_head = True  # the head is the transpose of the token embedding
    model.vocab_parallel = False  # token embedding and head cut over mesh.model, for large vocabularies
    model.dropout = 0.0  # of embeddings, attention weights and both residual branches; the same on every mesh
    model.dtype = "float32"  # of activations, or "bfloat16"; parameters are float32
    model.remat = "none"  # "block": compute each block again on the way back, for memory
    model.scan_layers = True  # one compiled block for all layers; False: unrolled

    config.data = data = ConfigDict()
    data.source = "stdlib"  # Python's own source files; "enwik8"; or "text", any file
    data.path = ""  # the file ("enwik8": the raw file or a prefix of it; empty: download)
    data.separator = ""  # documents end with this string, and tokens see their own document alone; empty: one document
    data.seq_len = 512  # tokens (bytes) per sequence
    data.batch_size = 16  # whole sequences, over all devices

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # or "muon": for the kernels of layers, which it orthogonalizes; AdamW for the rest
    optim.steps = 300
    optim.learning_rate = 1e-3  # the peak
    optim.warmup_steps = 20
    optim.weight_decay = 0.1  # not on norms and biases; "muon": on its kernels alone
    optim.clip_norm = 1.0  # global norm of the gradient
    optim.beta1 = 0.9  # momentum, of "muon" too
    optim.beta2 = 0.95
    optim.accumulate = 1  # microbatches per step
    optim.shard_state = False  # a share of Adam's moments per device, also of weights that are on all of them (ZeRO-1)
    optim.max_skipped = 10  # so many steps in a row whose loss or gradient is not finite end the run

    config.profile = profile = ConfigDict()  # a trace of training steps, in WORKDIR/profile
    profile.start = 10  # the first of them; by then the caches are warm
    profile.steps = 0  # how many; 0: none
    return config
