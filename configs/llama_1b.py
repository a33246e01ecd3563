"""The shape of Llama 3.2 1B (1.24 billion parameters), with all on that saves memory.

    python -m lss_jax.train --config configs/llama_1b.py --config.mesh.seq=8 --config.data.seq_len=1048576

Reproduces: nothing of the paper's; the shape is that of the model card (16 layers, width 2048, 32 heads of which 8 have
keys and values, MLP 8,192, a tied head over 128,256 tokens).
Cost: meant for accelerators; not timed.
Expected: unknown; it has not been run.
"""

from ml_collections import ConfigDict

from configs import llama_8b


def get_config() -> ConfigDict:
    config = llama_8b.get_config()
    config.model.layers = 16
    config.model.width = 2048
    config.model.mlp_width = 8192
    config.model.tied_head = True
    return config
