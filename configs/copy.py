"""An encoder-decoder that learns to copy 64 random symbols, with source and target sharded over all devices.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m lss_jax.train --config=configs/copy.py --workdir=runs/copy

Reproduces: nothing of the paper's, which names encoder-decoders as models that its attention serves.
Cost: measured with Python 3.11 on two CPU cores that had much else to do (8 simulated devices): 3:01 minutes in all.
Expected: all tokens of the first 4 validation batches exact after 100 steps, and 0.105 bits per token after 200.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "sequence_to_sequence"
    config.mesh.data, config.mesh.seq = 1, -1
    config.model.family = "encoder_decoder"
    config.model.vocab = 65  # 64 symbols and a start token
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 4
    config.model.positions = "rope"
    config.data.source = "copy"
    config.data.symbols = 64
    config.data.seq_len = 64
    config.data.batch_size = 16
    config.optim.steps = 200
    config.optim.learning_rate = 3e-3
    config.log_every = 20
    config.eval_every = 100
    config.eval_batches = 4
    config.checkpoint_every = 100
    return config
