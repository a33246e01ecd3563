"""A model that was imported, its context extended eight times by YaRN, on documents of the user's own.

    python -m lss_jax.convert --from-hf MODEL --workdir runs/extended --config configs/extend.py
    python -m lss_jax.train --workdir runs/extended --config.data.source=text --config.data.path='papers/*.jsonl.gz'
    python -m lss_jax.evaluate --workdir runs/extended --split test --by-position
    python -m lss_jax.convert --workdir runs/extended --to-hf extended

Reproduces: the recipe of Peng et al. 2023 (arXiv 2309.00071, Sec. 4.1), in small: 400 steps at a low rate, no decay.
MODEL is a folder with config.json and *.safetensors; its shape, and the context that is extended, are read from it.
Cost: by the model; docs/own_llama.md runs all four commands on a small one in minutes.
Expected: bits per byte that go on falling by position behind the length that the model was trained on.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.mesh.data = 1
    config.mesh.seq = -1
    config.mesh.shard = "all"
    config.model.positions = "rope"
    config.model.rope_scaling = "yarn"
    config.model.rope_factor = 8.0
    config.model.rope_original = 4096  # that of MODEL, if its config.json says
    config.model.remat = "input"
    config.model.tile = 2048
    config.data.seq_len = 32_768  # 8 x 4,096
    config.data.batch_size = 1
    config.optim.steps = 400
    config.optim.learning_rate = 2e-5
    config.optim.warmup_steps = 20
    config.optim.weight_decay = 0.0
    return config
