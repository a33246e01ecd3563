"""The paper's longest sequence: 50,112 tokens on 3,456 devices, 144 to a sequence and 24 data groups.

    python -m lss_jax.train --config configs/paper_50112.py

Reproduces: the setting of the paper's weak scaling at its largest (348 tokens per device).
Cost: 3,456 devices; with any other number the command says what is missing and stops.
Expected: nobody has run it. A test traces its step on the mesh of 24 x 144, so that shapes and the gradient law hold.
"""

from ml_collections import ConfigDict

from configs import enwik8


def get_config() -> ConfigDict:
    config = enwik8.get_config()
    config.attention.layout = "contiguous"
    config.mesh.data = 24
    config.mesh.seq = 144
    config.data.seq_len = 50_112
    config.data.batch_size = 24
    return config
