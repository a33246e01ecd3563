"""Attention as the `attention_fn` of layers of Flax: a model trains as with Flax's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import assert_close, mesh_of, relative_error, sampled

import lss_jax
from lss_jax.attention.strategies import EXACT
from lss_jax.config.schema import ConfigError
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE

pytestmark = pytest.mark.usefixtures("strict_ranks")
B = 2
BOUND = 1e-5
BLOCKS = {"block_queries": 8, "block_keys": 8}
PADDED = np.arange(43) < np.array([[43], [9]])  # which tokens there are
INPUTS = np.random.default_rng(0).normal(size=(3, B, 43, 6, 8)).astype(np.float32)


class Decoder(nnx.Module):
    """A small language model as one writes it in Flax."""

    def __init__(self, rngs: nnx.Rngs, kv_heads: int | None = None, **options):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.layers = nnx.List(
            [nnx.MultiHeadAttention(8, 32, num_kv_heads=kv_heads, decode=False, rngs=rngs, **options) for _ in range(2)]
        )
        self.norms = nnx.List([nnx.LayerNorm(32, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, tokens_BL):
        x_BLE = self.embed(tokens_BL)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x_BLE = x_BLE + layer(norm(x_BLE), is_causal=True)
        return self.head(x_BLE)


@nnx.jit
def train_step(model, optimizer, tokens_BL):
    def loss(model):
        logits_BLV = model(tokens_BL[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def trained(steps: int, **options):
    """The losses of some steps, and the parameters after them."""
    model = Decoder(nnx.Rngs(0), **options)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3, 0.9)), wrt=nnx.Param)
    tokens_BL = jax.random.randint(jax.random.key(1), (4, 44), 0, 64)
    losses = [float(train_step(model, optimizer, tokens_BL)) for _ in range(steps)]
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


MODELS = [
    ("lss", "contiguous", 2),
    ("ring", "zigzag", 8),
    ("ulysses", "contiguous", 4),
]


@pytest.mark.parametrize("case", sampled(MODELS, MODELS[:1]), ids=str)
def test_a_model_of_flax_trains_as_with_flax_own_attention(case):
    strategy, layout, kv_heads = case
    ours = lss_jax.attention_fn(mesh_of(2, 4), strategy=strategy, layout=layout, **BLOCKS)
    (losses, found), (expected_losses, expected) = (
        trained(3, kv_heads=kv_heads, **changes) for changes in ({"attention_fn": ours}, {})
    )
    assert losses[2] < losses[0] - 0.1, "it learns"
    assert_close(losses, expected_losses, BOUND)
    key_biases = [layer["key"].pop("bias") for tree in (found, expected) for layer in tree["layers"].values()]
    assert_close(found, expected, BOUND)
    assert max(np.abs(bias).max() for bias in key_biases) < 1e-6, "they shift all scores alike: their gradient is zero"


def test_a_layer_computes_in_its_own_dtype():
    found = lss_jax.attention_fn(mesh_of(1, 4))(*INPUTS, dtype=jnp.bfloat16, dropout_rate=0.1, deterministic=True)
    assert found.dtype == jnp.bfloat16
    assert_close(np.asarray(found, np.float32), jax.nn.dot_product_attention(*INPUTS), 2e-2)


def test_options_of_all_layers():
    attend = lss_jax.attention_fn(mesh_of(1, 2), is_causal=True, local_window_size=3)
    expected = jax.nn.dot_product_attention(*INPUTS, is_causal=True, local_window_size=3)
    for is_causal in (False, True):
        assert_close(attend(*INPUTS, is_causal=is_causal), expected, BOUND)


@pytest.mark.parametrize(
    ("of_layer", "of_call", "message"),
    [
        ({}, {"sow_weights": True}, "sow_weights=True is refused, since attention weights exist in blocks alone; use"),
        (
            {"precision": ("highest", "default")},
            {},
            "precision=('highest', 'default') must be one for both factors",
        ),
        ({"dropout_rate": 1.0, "deterministic": False}, {}, "dropout_rate=1.0 must be at least 0 and below 1"),
    ],
    ids=["weights", "precision", "dropout"],
)
def test_what_flax_can_and_this_cannot(of_layer, of_call, message):
    attend = lss_jax.attention_fn(mesh_of(1, 2))
    layer = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=attend, rngs=nnx.Rngs(0), **of_layer)
    with pytest.raises(ConfigError) as error:
        layer(jnp.ones((B, 43, 32)), **of_call)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("make", [nnx.make_causal_mask, partial(nnx.make_attention_mask, PADDED)])
def test_masks_as_flax_makes_them(make):
    """They are numbers, not booleans, and under `jit`: so they are read as arrays."""
    layer = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
    ours = nnx.clone(layer)
    ours.attention_fn = lss_jax.attention_fn(mesh_of(1, 4), **BLOCKS)
    x_BLE = np.random.default_rng(0).normal(size=(B, 43, 32)).astype(np.float32)
    call = nnx.jit(lambda layer: layer(x_BLE, mask=make(PADDED)))
    assert_close(call(ours)[PADDED], call(layer)[PADDED], BOUND)


def test_arguments_that_nobody_knows_are_refused():
    with pytest.raises(ConfigError, match=r"stratgy='ring' is no argument of attention_fn, which takes .* strategy, "):
        lss_jax.attention_fn(mesh_of(1, 2), stratgy="ring")
    with pytest.raises(
        ConfigError, match=r"dropuot=0.1 is no argument of the function of attention_fn, which takes bias, mask,"
    ):
        lss_jax.attention_fn(mesh_of(1, 2))(*INPUTS, dropuot=0.1)


def weights(attend, **options):
    """Attention weights `[B, H, L, S]`, by values of which each has a feature of its own."""
    query, key, _ = (x[:, :8] for x in INPUTS)
    value = np.broadcast_to(np.eye(8, dtype=np.float32)[:, None], query.shape)
    return np.asarray(attend(query, key, value, **options)).transpose(0, 2, 1, 3)


DROPS = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(5)}


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_takes_weights_by_chance_and_enlarges_the_others(shared):
    attend = lss_jax.attention_fn(mesh_of(2, 2), **BLOCKS)
    whole = weights(attend, **DROPS, deterministic=True)
    factor = weights(attend, **DROPS, broadcast_dropout=shared) / whole
    drops = factor < 0.5
    assert 0.15 < drops.mean() < 0.45
    np.testing.assert_allclose(factor[~drops], 1 / 0.7, rtol=1e-5)
    for axis in (0, 1):
        assert (drops == drops.take([0], axis)).all() == shared, "rows and heads drop alike, or not"
    other = weights(attend, **DROPS | {"dropout_rng": jax.random.key(6)}, broadcast_dropout=shared)
    assert ((other / whole < 0.5) != drops).any()


DROPPED = [
    (strategy, layout, sizes, shared)
    for strategy in EXACT
    for layout in CHUNKS_PER_DEVICE
    for sizes in [(1, 3, 1), (2, 2, 1), (1, 1, 2)]
    for shared in (False, True)
]


@pytest.mark.parametrize("case", sampled(DROPPED, DROPPED[::7]), ids=str)
def test_dropout_is_the_same_on_every_mesh(case):
    strategy, layout, sizes, shared = case

    def gradients(mesh, **options):
        attend = lss_jax.attention_fn(mesh, **BLOCKS, **options)
        call = partial(attend, **DROPS, broadcast_dropout=shared, is_causal=True)
        return jax.jit(jax.value_and_grad(lambda arrays: (call(*arrays) ** 2).sum()))(INPUTS)

    expected = gradients(mesh_of(1, 1), kernel="dense")
    assert_close(gradients(mesh_of(*sizes), strategy=strategy, layout=layout), expected, BOUND)


def test_a_layer_with_dropout():
    attend = lss_jax.attention_fn(mesh_of(1, 2))
    layer = nnx.MultiHeadAttention(4, 32, dropout_rate=0.5, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
    x_BLE = np.ones((B, 43, 32), np.float32)
    once, again = (layer(x_BLE, deterministic=False) for _ in range(2))
    assert relative_error(once, again) > 1e-3, "each call has a key of its own"
    with pytest.raises(ConfigError, match=r"dropout_rate=0\.5 needs a key; give dropout_rng=jax\.random\.key"):
        attend(*INPUTS, dropout_rate=0.5)


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2], ids=str)
@pytest.mark.parametrize("strategy", EXACT)
def test_a_precision_holds_in_both_passes(strategy, precision):
    attend = partial(lss_jax.attention_fn(mesh_of(1, 2), strategy=strategy, **BLOCKS), precision=precision)
    program = jax.jit(jax.grad(lambda arrays: (attend(*arrays) ** 2).sum())).lower(INPUTS).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) > 6 and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize("mask", [None, PADDED[:, None, None] & PADDED[:, None, :, None]], ids=["all", "padding"])
def test_a_layer_of_linen(mask):
    """Which passes what a function has arguments for, and neither knows nor passes `is_causal`."""
    x_BLE = np.random.default_rng(0).normal(size=(B, 43, 32)).astype(np.float32)
    theirs, ours = (
        linen.MultiHeadDotProductAttention(4, **changes)
        for changes in ({}, {"attention_fn": lss_jax.attention_fn(mesh_of(2, 2), **BLOCKS)})
    )
    params = theirs.init(jax.random.key(0), x_BLE)

    def loss(layer, params):
        return (layer.apply(params, x_BLE, mask=mask)[PADDED] ** 2).sum()

    found, expected = (jax.value_and_grad(partial(loss, layer))(params) for layer in (ours, theirs))
    for tree in (found, expected):
        tree[1]["params"]["key"].pop("bias")  # it shifts all scores alike: its gradient is zero
    assert_close(found, expected, BOUND)


def test_promotion_is_the_one_that_is_given():
    attend = lss_jax.attention_fn(mesh_of(1, 2))
    found = attend(*INPUTS, promote_dtype=lambda arrays, dtype: [x.astype(jnp.float16) for x in arrays])
    assert found.dtype == jnp.float16


def test_decoding_from_the_cache_of_flax():
    """Each query meets all of the cache, behind a mask of what has been decoded."""
    layers = [nnx.MultiHeadAttention(4, 32, decode=True, rngs=nnx.Rngs(0)) for _ in range(2)]
    layers[1].attention_fn = lss_jax.attention_fn(mesh_of(1, 2), **BLOCKS)
    for layer in layers:
        layer.init_cache((B, 12, 32))
    x_BLE = np.random.default_rng(0).normal(size=(B, 12, 32)).astype(np.float32)
    for token in range(3):
        expected, found = (layer(x_BLE[:, token : token + 1]) for layer in layers)
        assert_close(found, expected, BOUND)
