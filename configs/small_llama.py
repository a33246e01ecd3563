"""A small Llama-class model (RMSNorm, SwiGLU, rope, grouped queries) on documents, with a tokenizer of one's own.

    python -m lss_jax.tokenize --train 2048 --out runs/tokenizer.json DOCUMENTS
    python -m lss_jax.train --config configs/small_llama.py --config.data.tokenizer=runs/tokenizer.json \
        --config.data.source=text --config.data.path=DOCUMENTS

Reproduces: nothing; docs/own_llama.md begins with it, and experiments/own_llama measures it.
Cost: measured on two CPU cores (8 simulated devices), 700 steps on enwik8's first 4 MB with 4,096 tokens: 4:20 minutes.
Expected: there, 2.14 bits per byte on the whole validation split (experiments/own_llama).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.log_every = 20
    config.eval_every = 200
    config.checkpoint_every = 200
    config.mesh.data = -1
    config.mesh.seq = 4
    config.attention.strategy = "lss"
    config.model.vocab = 2048
    config.model.kv_heads = 2
    config.model.mlp_width = 352
    config.model.norm = "rms"
    config.model.norm_epsilon = 1e-5
    config.model.mlp = "swiglu"
    config.model.bias = False
    config.model.positions = "rope"
    config.data.seq_len = 256
    config.data.batch_size = 8
    config.optim.name = "muon"
    config.optim.steps = 600
    config.optim.learning_rate = 8e-3
    config.optim.warmup_steps = 40
    config.optim.beta1 = 0.95
    config.optim.beta2 = 0.99
    return config
