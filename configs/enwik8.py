"""enwik8 with the paper's model size."""

from configs import base


def get_config():
    config = base.get_config()
    config.data.source = "enwik8"
    config.data.seq_len = 4096
    config.data.batch_size = 32
    config.mesh.data = 1
    config.mesh.seq = -1
    config.model.layers = 6
    config.model.width = 512
    config.model.heads = 8
    config.model.dtype = "bfloat16"
    config.optim.steps = 50_000
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 1_000
    config.eval_every = 1_000
    config.checkpoint_every = 1_000
    config.log_every = 50
    return config
