"""The paper's longest sequence: 50,112 tokens on 3,456 devices, 24 data groups of 144 devices per sequence.

    python -m lss_jax.train --config configs/paper_50112.py

Reproduces: the setting of the paper's weak scaling at its largest (348 tokens per device).
Cost: 3,456 devices; on any other number the command raises an error that names the mesh and the devices.
Expected: unknown; it has not been run. Its step compiles for 3,456 TPU v5p chips (experiments/paper/weak_scaling.md),
and a test traces it on a mesh of 24 x 144 to check shapes and the sums of its gradients.
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
