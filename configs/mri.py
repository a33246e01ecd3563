"""Tissues in slices of a brain: every pixel of a slice of the template MNI152 is a token, and gets a class.

    pip install -r requirements-images.txt
    python -m lss_jax.train --config configs/mri.py

Reproduces: nothing of the paper's; image segmentation is what it names as future work. At full resolution a slice is
45,901 pixels (data.downsample=1, data.seq_len=45901, model.rope_columns=197), near the paper's 50,112 tokens.
Cost: measured with Python 3.11 and 8 simulated devices: 1:51 minutes of CPU time in all; on two idle cores not timed.
Expected: a mean Dice coefficient of 0.83 on the first 4 validation batches after 100 steps, and on the whole test split
0.84: outside 1.00, fluid 0.44, grey 0.94, white 0.97 (measured; it still rises). Grey levels alone, without a model,
give 0.85, with 0.51 for fluid (experiments/segmentation).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "token_labels"
    config.log_every = 10
    config.eval_every = 50
    config.eval_batches = 4
    config.mesh.data = 1
    config.mesh.seq = -1
    config.attention.layout = "contiguous"
    config.model.family = "encoder"
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 4
    config.model.classes = 4  # outside, fluid, grey and white matter
    config.model.positions = "rope"
    config.model.rope_base = 100.0
    config.model.rope_columns = 49
    config.data.source = "mri"
    config.data.downsample = 4  # 58 x 49 pixels
    config.data.patch = 1
    config.data.seq_len = 2842
    config.data.batch_size = 2
    config.optim.name = "muon"
    config.optim.steps = 100
    config.optim.learning_rate = 8e-3
    config.optim.beta1 = 0.95
    config.optim.beta2 = 0.99
    return config
