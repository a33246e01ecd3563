"""50,112 tokens over 3,456 devices."""

from configs import enwik8


def get_config():
    config = enwik8.get_config()
    config.mesh.data = 24
    config.mesh.seq = 144
    config.data.seq_len = 50_112
    config.data.batch_size = 24
    config.model.remat = "block"
    return config
