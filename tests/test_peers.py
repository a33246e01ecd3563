"""Models of others, with our attention swapped in as the recipes say: loss and gradients are what they were.

Equinox is in requirements-peers.txt. lm1b (Linen) and Gemma (NNX) are examples in Flax's repository, and LSS_JAX_FLAX
names a clone of it: `git clone --depth 1 https://github.com/google/flax`. Nothing of them is here.
"""

import importlib
import os
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import assert_close, mesh_of

import lss_jax

ROOT = Path(__file__).parents[1]
FLAX = os.environ.get("LSS_JAX_FLAX")
pytestmark = pytest.mark.peers
models_of_flax = pytest.mark.skipif(FLAX is None, reason="LSS_JAX_FLAX names no clone of Flax")
BLOCKS = {"block_queries": 8, "block_keys": 8}
MESHES = [(1, 8, 1), (2, 2, 2), (1, 5, 1)]
BOUND = 1e-5
L = 43
TOKENS_BL = np.random.default_rng(0).integers(1, 50, (2, L)) * (np.arange(L) < np.array([[L], [30]]))  # 0 is padding


def recipe(name: str) -> str:
    """The program of a section of the recipes."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    section = re.search(rf"^## {name}.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section
    return "\n".join(re.findall(r"```python\n(.*?)```", section.group(), re.DOTALL))


@pytest.fixture
def example(monkeypatch):
    """Imports a module of an example of Flax, whose modules have short names, as some of ours have."""

    def imported(folder: str, *names: str):
        monkeypatch.syspath_prepend(str(Path(FLAX) / "examples" / folder))
        monkeypatch.delitem(sys.modules, "helpers")
        return [importlib.import_module(name) for name in names]

    before = dict(sys.modules)
    yield imported
    for name in set(sys.modules) - set(before):
        if FLAX and (getattr(sys.modules[name], "__file__", None) or "").startswith(FLAX):
            del sys.modules[name]


def loss_of(logits_BLV, tokens_BL, counted_BL):
    """The loss of next tokens, where there are some."""
    logs_BLV = jax.nn.log_softmax(logits_BLV[:, :-1])
    found_BL = jnp.take_along_axis(logs_BLV, tokens_BL[:, 1:, None], -1)[..., 0]
    return -(found_BL * counted_BL[:, 1:]).sum() / counted_BL[:, 1:].sum()


def test_the_recipe_for_equinox():
    names = {"jax": jax, "np": np, "lss_jax": lss_jax, "mesh": mesh_of(2, 4)}
    names["x_BLE"] = jax.random.normal(jax.random.key(0), (2, 100, 64))
    exec(recipe("Equinox"), names)


@models_of_flax
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_lm1b(monkeypatch, example, sizes, packed):
    (models,) = example("lm1b", "models")
    config = models.TransformerConfig(
        vocab_size=50,
        output_vocab_size=50,
        emb_dim=40,
        num_heads=10,
        num_layers=2,
        qkv_dim=40,
        mlp_dim=64,
        max_len=64,
        deterministic=True,
    )
    document_BL = 1 + np.arange(L) // np.array([[13], [20]])
    inputs = {}
    if packed:
        starts_BL = np.arange(L) // np.array([[13], [20]]) * np.array([[13], [20]])
        inputs = {"inputs_positions": np.arange(L) - starts_BL, "inputs_segmentation": document_BL * (TOKENS_BL > 0)}
    model = models.TransformerLM(config)
    params = linen.meta.unbox(model.init(jax.random.key(0), TOKENS_BL, **inputs))

    def loss(params):
        return loss_of(model.apply(params, TOKENS_BL, **inputs), TOKENS_BL, TOKENS_BL > 0)

    expected = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    attend = lss_jax.attention_fn(mesh_of(*sizes), **BLOCKS)
    ours = partial(linen.MultiHeadDotProductAttention, attention_fn=attend)
    monkeypatch.setattr(models.nn, "MultiHeadDotProductAttention", ours)
    assert_close(jax.jit(jax.value_and_grad(lambda params: loss(params)))(params), expected, BOUND)


@models_of_flax
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_gemma(monkeypatch, example, sizes, kv_heads):
    transformer, modules, configs = example("gemma", "transformer", "modules", "transformer_cfg")
    config = configs.TransformerConfig(
        num_layers=3,
        num_embed=50,
        embed_dim=32,
        hidden_dim=64,
        num_heads=8,
        head_dim=8,
        num_kv_heads=kv_heads,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        sliding_window_size=7,
        attention_types=[configs.AttentionType.LOCAL_SLIDING] * 2 + [configs.AttentionType.GLOBAL],
    )
    there_BL = TOKENS_BL > 0
    positions_BL = transformer.build_positions_from_mask(there_BL)
    model = transformer.Transformer(config, rngs=nnx.Rngs(0))

    @nnx.jit
    def loss_and_gradients(model):
        def loss(model):
            mask_BLL = transformer.make_causal_attn_mask(there_BL)
            return loss_of(model(TOKENS_BL, positions_BL, None, mask_BLL)[0], TOKENS_BL, there_BL)

        value, gradients = nnx.value_and_grad(loss)(model)
        return value, nnx.to_pure_dict(gradients)

    expected = loss_and_gradients(model)
    monkeypatch.setattr(modules.Attention, "__call__", modules.Attention.__call__)  # undone at the end
    exec(recipe("Gemma"), {"lss_jax": lss_jax, "mesh": mesh_of(*sizes)})
    jax.clear_caches()
    assert_close(loss_and_gradients(model), expected, BOUND)
