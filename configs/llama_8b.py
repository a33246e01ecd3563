"""The shape of Llama 3 8B (8.03 billion parameters) for the longest sequences, with everything on that saves memory.

    python -m lss_jax.train --config configs/llama_8b.py --config.mesh.seq=8 --config.data.seq_len=1048576

Reproduces: nothing of the paper's; the shape is that of Dubey et al. 2024 (arXiv 2407.21783, Table 3).
Cost: meant for accelerators; not timed. How long a sequence fits is compiled in experiments/longest.
Expected: unknown; it has not been run.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.mesh.data = 1
    config.mesh.seq = -1
    config.mesh.shard = "all"
    config.attention.head_groups = 8
    config.attention.block_keys = 512
    config.attention.regather = True
    config.model.vocab = 128_256
    config.model.layers = 32
    config.model.width = 4096
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.mlp_width = 14_336
    config.model.norm = "rms"
    config.model.mlp = "swiglu"
    config.model.bias = False
    config.model.positions = "rope"
    config.model.rope_base = 500_000.0
    config.model.tied_head = False
    config.model.dtype = "bfloat16"
    config.model.remat = "offload"
    config.model.tile = 2048
    config.data.batch_size = 1
    return config
