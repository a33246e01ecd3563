"""The paper's model on its data: 6 layers, width 512, 8 heads (20M parameters) on enwik8, in bfloat16.

    python -m lss_jax.train --config configs/enwik8.py --config.mesh.seq=8

Reproduces: the setting of the paper's experiments (arXiv 2311.02382, Results), at a sequence that one node holds.
Cost: made for accelerators. A step is 32,768 tokens, by arithmetic about 4.1e12 operations for the weights (a third
more, since blocks are computed twice) and 2.9e12 for causal attention, whose rows are kept. Nobody has timed the whole
run yet.
Expected: unknown for the whole run. Scaled down to two CPU cores, see experiments/same_curve.
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
