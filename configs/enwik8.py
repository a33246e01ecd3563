"""The paper's model on its data: 6 layers, width 512, 8 heads (20M parameters) on enwik8, in bfloat16.

    python -m lss_jax.train --config configs/enwik8.py --config.mesh.seq=8

Reproduces: the setting of the paper's experiments (arXiv 2311.02382, Results), at a sequence length for one node.
Cost: meant for accelerators. A step is 32,768 tokens: by count 4.6e12 operations in projections, MLPs and head (with
the recomputation of blocks) and 3.1e12 in causal attention (whose output is saved, not recomputed). The whole run has
not been timed.
Expected: unknown for the whole run; experiments/same_curve has it scaled down to two CPU cores.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "enwik8"
    config.data.seq_len = 4096
    config.data.batch_size = 8
    config.model.layers = 6
    config.model.width = 512
    config.model.heads = 8
    config.model.dtype = "bfloat16"
    config.model.remat = "block"
    config.attention.regather = True
    config.optim.steps = 50_000
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 1_000
    config.eval_every = 1_000
    config.checkpoint_every = 1_000
    config.log_every = 50
    return config
