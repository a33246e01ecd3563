"""Hugging Face folders with random tensors, without the library that makes them."""

import json

import helpers
import numpy as np
from helpers import small_config
from safetensors.numpy import save_file
from tokenizer_cases import trained

from lss_jax.huggingface import exporting
from lss_jax.huggingface.families import FAMILIES
from lss_jax.huggingface.importing import shapes_by_name
from lss_jax.huggingface.keys import their_config
from lss_jax.models import build_model

LLAMA = {**helpers.LLAMA, "model__heads": 8, "model__kv_heads": 4, "model__vocab": 263}
GPT2 = {"model__qkv_bias": True}
MODELS = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "attention__window": 9},
    "qwen2": {**LLAMA, "model__qkv_bias": True, "model__tied_head": True},
    "qwen3": {**LLAMA, "model__qk_norm": True, "model__head_width": 12},
    "gpt2": GPT2,
}


def make_folder(path, family, **changes):
    """A folder with random tensors, for a small config, which is returned."""
    config = small_config(**{**MODELS[family], **changes})
    random = np.random.default_rng(0)
    groups = exporting.groups_of(FAMILIES[family].tensors, shapes_by_name(build_model(config)))
    path.mkdir()
    save_file({name: random.standard_normal(g.shape, np.float32) for g in groups for name in g.tensors}, file_of(path))
    (path / "config.json").write_text(json.dumps(their_config(config, family, None)))
    return config


def file_of(folder):
    return folder / "model.safetensors"


def with_tokenizer(folder, vocab=263):
    """A tokenizer, with what lies beside it."""
    trained(folder, size=vocab)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text("{}")
