"""Attention on global arrays equals JAX's own, in values and gradients, on any mesh; and so does a model of Flax."""

import inspect
import subprocess
import sys
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, mesh_of, sampled
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lss_jax
from configs import base
from lss_jax.attention import STRATEGIES
from lss_jax.attention.mask import packed
from lss_jax.config import ConfigError
from lss_jax.hlo import collectives
from lss_jax.layout import CHUNKS_PER_DEVICE
from lss_jax.mesh import SEQ

B, H, K = 2, 24, 8  # 2, 3, 4 and 8 devices divide the heads, for Ulysses
BOUND = 1e-5
BLOCKS = {"block_queries": 8, "block_keys": 8}
attention = lss_jax.dot_product_attention


@cache
def arrays_of(length: int, kv_heads: int = H, rows: tuple[int, ...] = (B,), heads: int = H) -> list[np.ndarray]:
    """Random `q, k, v, do`."""
    random = np.random.default_rng(length)
    return [random.standard_normal((*rows, length, n, K), np.float32) for n in (heads, kv_heads, kv_heads, heads)]


def with_gradients(function, arrays):
    """`o, dq, dk, dv` by name."""
    *inputs, do = arrays
    o, transpose = jax.vjp(function, *inputs)
    results = dict(zip(("o", "dq", "dk", "dv"), (o, *transpose(jnp.asarray(do))), strict=True))
    return jax.block_until_ready(results)


def of_jax(arrays, **options):
    """The same by JAX's own attention, in one program."""
    return jax.jit(partial(with_gradients, partial(jax.nn.dot_product_attention, **options)))(arrays)


def assert_equal_to_jax(arrays, **options) -> None:
    found = with_gradients(partial(attention, is_causal=True, **options), arrays)
    assert_close(found, of_jax(arrays, is_causal=True), BOUND)


@cache
def masks(length: int) -> dict[str, tuple[dict, np.ndarray]]:
    """Our arguments, and which keys each query sees, `[B, L, L]` or `[L, L]`."""
    position, causal_LL = np.arange(length), np.tri(length, dtype=bool)
    offset_LL = position - position[:, None]
    document_BL = np.stack([np.searchsorted(cuts, position, side="right") for cuts in ([9, 10, 30], [5, 21, 22])])
    own_BLL = document_BL[:, :, None] == document_BL[:, None]
    start, end = position // 2, np.minimum(position // 2 + 1 + position % 3 * 7, length)
    lengths_B = np.array([length - 9, 3])
    return {
        "causal": ({"is_causal": True}, causal_LL),
        "bidirectional": ({}, np.ones_like(causal_LL)),
        "window": ({"local_window_size": (3, 9)}, (offset_LL >= -3) & (offset_LL <= 9)),
        "causal, window": ({"is_causal": True, "local_window_size": 4}, causal_LL & (offset_LL >= -4)),
        "prefix": ({"is_causal": True, "prefix": 11}, causal_LL | (position < 11)),
        "documents": ({"intervals": packed(document_BL)}, own_BLL),
        "documents, causal": ({"intervals": packed(document_BL), "is_causal": True}, own_BLL & causal_LL),
        "intervals": ({"intervals": (start, end)}, (start[:, None] <= position) & (position < end[:, None])),
        "padding": ({"intervals": (0, lengths_B[:, None])}, (position < lengths_B[:, None])[:, None]),
    }


CASES = [
    (strategy, layout, sizes, *shape)
    for strategy in STRATEGIES
    for layout in CHUNKS_PER_DEVICE
    for sizes in [(1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 8, 1), (2, 2, 2)]
    for shape in [(48, H), (43, 2)]  # of no mesh but the first is 43 a multiple
    if shape == (43, 2) or sizes in [(1, 8, 1), (2, 2, 2)]
]
SAMPLE = [
    ("lss", "contiguous", (1, 8, 1), 43, 2),
    ("ring", "zigzag", (1, 3, 1), 43, 2),
    ("ulysses", "contiguous", (1, 2, 1), 43, 2),
]


@cache
def expected(length: int, kv_heads: int) -> dict[str, dict]:
    """JAX's own results by the name of the mask."""

    @jax.jit
    def results(seen_BLL):
        return of_jax(arrays_of(length, kv_heads), mask=seen_BLL[:, None])

    return {name: results(np.broadcast_to(seen, (B, length, length))) for name, (_, seen) in masks(length).items()}


@pytest.mark.parametrize("case", sampled(CASES, SAMPLE), ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_values_and_gradients_are_those_of_jax(case):
    strategy, layout, sizes, length, kv_heads = case
    options = dict(mesh=mesh_of(*sizes), strategy=strategy, layout=layout, **BLOCKS)
    arrays = arrays_of(length, kv_heads)
    found = {
        name: with_gradients(partial(attention, **arguments, **options), arrays)
        for name, (arguments, _) in masks(length).items()
    }
    assert_close(found, expected(length, kv_heads), BOUND)


OPTIONS = [{"kernel": "dense"}, {"gather_groups": 2, "regather": True}, {"block_queries": 512, "block_keys": 256}]


@pytest.mark.parametrize("options", sampled(OPTIONS, OPTIONS[1:2]), ids=str)
def test_no_option_changes_the_result(options):
    assert_equal_to_jax(arrays_of(43, 6), mesh=mesh_of(1, 4), **{**BLOCKS, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.7, "local_window_size": (3, 9)},
        {"is_causal": True, "local_window_size": 4},
        {"is_causal": False, "local_window_size": 0, "scale": None},
    ],
    ids=str,
)
def test_arguments_mean_what_they_mean_to_jax(options):
    *inputs, _ = arrays_of(43)
    expected = jax.nn.dot_product_attention(*inputs, **options)
    assert_close(attention(*inputs, mesh=mesh_of(1, 2), **options), expected, BOUND)


SHAPES = [((), 6), ((1,), 6), ((3,), 1)]  # rows, key/value heads


@pytest.mark.parametrize("shape", sampled(SHAPES, SHAPES[2:]), ids=str)
def test_what_does_not_divide_batch_or_heads_does_not_cut_them(shape):
    rows, kv_heads = shape
    assert_equal_to_jax(arrays_of(43, kv_heads, rows, 6), mesh=mesh_of(2, 2, 2))


AXES = [("replica", "context", "tensor"), (("replica", "tensor"), "context", None)]


@pytest.mark.parametrize("axes", sampled(AXES, AXES[1:]), ids=str)
def test_a_mesh_may_have_other_names(axes):
    mesh = Mesh(np.reshape(jax.devices(), (2, 2, 2)), ("tensor", "context", "replica"))
    assert_equal_to_jax(arrays_of(48, 6, (4,)), mesh=mesh, axes=axes)


@pytest.mark.parametrize("strategy", sampled(STRATEGIES, ["lss"]))
def test_a_query_that_sees_nothing_has_a_row_of_zeros_and_no_gradient(strategy):
    found = with_gradients(
        partial(attention, mesh=mesh_of(1, 2), strategy=strategy, intervals=(5, np.where(np.arange(43) < 20, 9, 5))),
        arrays_of(43),
    )
    for name in ("o", "dq"):
        assert not found[name][:, 20:].any() and found[name][:, :20].any()
    assert not found["dv"][:, 9:].any()


# In somebody's program


@pytest.mark.parametrize("strategy", sampled(STRATEGIES, ["lss"]))
@pytest.mark.parametrize("layout", sampled(CHUNKS_PER_DEVICE, ["contiguous"]))
def test_vmap_over_one_more_axis(strategy, layout):
    ours = partial(attention, mesh=mesh_of(2, 4), is_causal=True, strategy=strategy, layout=layout, **BLOCKS)
    arrays = arrays_of(43, 8, (3, B), 8)
    found = with_gradients(jax.jit(jax.vmap(ours)), arrays)
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    expected = {name: x.reshape(3, B, *x.shape[1:]) for name, x in of_jax(flat, is_causal=True).items()}
    assert_close(found, expected, BOUND)


def test_vmap_over_queries_and_intervals_alone():
    q, k, v, _ = arrays_of(43, 8, (3, B), 8)
    end_3 = np.array([43, 7, 20])

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None, None, 0))
    def ours(q, k, v, end):
        return attention(q, k, v, mesh=mesh_of(2, 4), intervals=(0, end))

    def theirs(q, k, v, end):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=jnp.full(B, end))

    expected = jnp.stack([theirs(q[n], k[0], v[0], end_3[n]) for n in range(3)])
    assert_close(ours(q, k[0], v[0], end_3), expected, BOUND)


@pytest.mark.parametrize("strategy", sampled(STRATEGIES, ["lss"]))
def test_under_checkpoint_in_a_jitted_gradient(strategy):
    def loss(attend, q, k, v):
        attend = jax.checkpoint(partial(attend, is_causal=True))
        return (attend(jnp.tanh(q), k, attend(q, k, v)) ** 2).mean()

    *inputs, _ = arrays_of(43, 8, heads=8)
    ours = partial(attention, mesh=mesh_of(1, 4), strategy=strategy, **BLOCKS)
    gradients = [
        jax.block_until_ready(jax.jit(jax.value_and_grad(partial(loss, attend), argnums=(0, 1, 2)))(*inputs))
        for attend in (ours, jax.nn.dot_product_attention)
    ]
    assert_close(*gradients, BOUND)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("set_mesh", sampled([False, True], [True]))
def test_a_mesh_whose_axes_are_explicit(set_mesh, placed):
    """`jax.make_mesh` makes such by default; the result is placed as the queries are."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    *inputs, _ = map(jnp.asarray, arrays_of(48, 8, heads=8))
    expected = jax.nn.dot_product_attention(*inputs, is_causal=True) + inputs[0]
    if placed:
        inputs = [jax.device_put(x, NamedSharding(mesh, P("data", "seq"))) for x in inputs]

    @jax.jit
    def found(q, k, v):
        return attention(q, k, v, mesh=mesh, is_causal=True) + q

    if set_mesh:
        with jax.set_mesh(mesh):
            assert_close(found(*inputs), expected, BOUND)
    else:
        assert_close(found(*inputs), expected, BOUND)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", {"all-gather": 1, "reduce-scatter": 1}),
        ("zigzag", {"all-gather": 1, "reduce-scatter": 1, "collective-permute": 8}),
    ],
)
def test_what_is_already_cut_moves_no_more_than_the_strategy_moves_it(layout, expected):
    mesh = mesh_of(1, 8)
    cut = NamedSharding(mesh, P(None, SEQ))
    shape = jax.ShapeDtypeStruct((B, 64, 8, K), jnp.float32, sharding=cut)

    @partial(jax.jit, out_shardings=cut)
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradient(q, k, v):
        return (attention(q, k, v, mesh=mesh, is_causal=True, layout=layout) ** 2).sum()

    found = collectives(gradient.lower(*[shape] * 3).compile().as_text())
    assert Counter(c.kind for c in found if c.kind != "all-reduce") == expected  # that one is of the loss


# In a model of Flax


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
    *inputs, _ = arrays_of(43)
    found = lss_jax.attention_fn(mesh_of(1, 4))(*inputs, dtype=jnp.bfloat16, dropout_rate=0.1, deterministic=True)
    assert found.dtype == jnp.bfloat16
    assert_close(np.asarray(found, np.float32), jax.nn.dot_product_attention(*inputs), 2e-2)


def test_options_of_all_layers():
    *inputs, _ = arrays_of(43)
    attend = lss_jax.attention_fn(mesh_of(1, 2), is_causal=True, local_window_size=3)
    expected = jax.nn.dot_product_attention(*inputs, is_causal=True, local_window_size=3)
    for is_causal in (False, True):
        assert_close(attend(*inputs, is_causal=is_causal), expected, BOUND)


# What it refuses


X = np.zeros((B, 48, 6, K), np.float32)
WRONG_ARRAYS = {
    "query (6, 8), key (6, 8), value (6, 8): each is [..., L, heads, K], of three": [X[0, 0]] * 3,
    "value (2, 48, 6, 4): they may differ in the number of the query heads alone": [X, X, X[..., :4]],
    "key (2, 47, 6, 8), value (2, 47, 6, 8): they may differ in": [X, X[:, 1:], X[:, 1:]],
    "(2, 0, 6, 8): nothing to attend to; every dimension must be at least 1": [X[:, :0]] * 3,
    "of dtypes float32, float32, bfloat16; give all three as float32 or as bfloat16": [X, X, jnp.bfloat16(X)],
    "of dtypes float16, float16, float16; give all three": [np.float16(X)] * 3,
    "heads=6 is not divisible by kv_heads=4; each key/value head serves equally many query heads: use kv_heads=6 or": [
        X,
        X[:, :, :4],
        X[:, :, :4],
    ],
}
WRONG_OPTIONS = {
    "strategy='lsss' is not known; choose one of 'lss', 'ring', 'ulysses'": {"strategy": "lsss"},
    "layout='striped' is not known; choose one of 'contiguous', 'zigzag'": {"layout": "striped"},
    "kernel='cudnn' is not known; choose one of 'auto', 'blockwise'": {"kernel": "cudnn"},
    "kernel='triton' is for NVIDIA GPUs of compute capability 8.0 or more, and these devices are cpu; use kernel=": {
        "kernel": "triton"
    },
    "block_keys=0 must be at least 1": {"block_keys": 0},
    "block_queries=8.0 is of type float; give a value of type int": {"block_queries": 8.0},
    "prefix=-1 must be at least 0": {"prefix": -1, "is_causal": True},
    "prefix=3 has no use with is_causal=False, under which all is seen anyway; use prefix=0": {"prefix": 3},
    "local_window_size=(-1, -1) must be one number or (left, right), each at least 0": {"local_window_size": -1},
    "local_window_size=(1, 2, 3) must be one number or (left, right)": {"local_window_size": (1, 2, 3)},
    "local_window_size=0.5 must be one number or (left, right)": {"local_window_size": 0.5},
    "intervals: end is of dtype float32; give positions as integers": {"intervals": (0, np.float32(5))},
    "intervals: start and end of shapes (47,) and () do not broadcast to (2, 48), which the queries have before": {
        "intervals": (np.zeros(47, int), 5)
    },
    "shapes () and (3, 2, 48) do not broadcast to (2, 48)": {"intervals": (0, np.zeros((3, 2, 48), int))},
    'heads=6 is not divisible by seq=4, which strategy="ulysses" needs; use heads=8 or strategy="lss"': {
        "strategy": "ulysses"
    },
    'heads=6 is not divisible by seq=2 times model=2, which strategy="ulysses" needs; use heads=8': {
        "strategy": "ulysses",
        "mesh": (1, 2, 2),
    },
    'kernel=\'dense\' cannot take keys as they come by, which strategy="ring" needs; use kernel="blockwise"': {
        "strategy": "ring",
        "kernel": "dense",
    },
    "gather_groups=2 has no use with strategy='ring', which gathers nothing; use gather_groups=1 or": {
        "strategy": "ring",
        "gather_groups": 2,
    },
    "kv_heads=6 is not divisible by gather_groups=4; use gather_groups=6 or another divisor": {"gather_groups": 4},
    "kv_heads=6 is not divisible by gather_groups=6 times model=2; use gather_groups=1": {
        "gather_groups": 6,
        "mesh": (1, 2, 2),
    },
    "regather=True has no use with strategy='ulysses', which keeps no gathered pairs; use regather=False": {
        "strategy": "ulysses",
        "regather": True,
        "mesh": (1, 2, 1),
    },
    "mesh=None is no jax.sharding.Mesh; give one, as of jax.make_mesh((jax.device_count(),), ('seq',))": {"mesh": None},
    "axes=('data', 'context', 'model') do not name axes of this mesh, which has 'data', 'seq', 'model'; give its": {
        "axes": ("data", "context", "model")
    },
    "axes=('data', 'seq', 'seq') do not name axes of this mesh": {"axes": ("data", "seq", "seq")},
    "axes=('dat', 'seq', None) do not name axes of this mesh": {"axes": ("dat", "seq", None)},
}


@pytest.mark.parametrize("message", WRONG_ARRAYS)
def test_arrays_that_do_not_go_together_are_one_clear_error(message):
    with pytest.raises(ConfigError) as error:
        attention(*WRONG_ARRAYS[message], mesh=mesh_of(1, 2))
    assert message in str(error.value)


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_options_that_cannot_work_are_one_clear_error(message):
    options = {"mesh": (1, 4, 1), **WRONG_OPTIONS[message]}
    if options["mesh"]:
        options["mesh"] = mesh_of(*options["mesh"])
    with pytest.raises(ValueError) as error:
        attention(X, X, X, **options)
    assert message in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        attention(X, X, X, mesh=mesh_of(1, 4), strategy="ulysses", block_keys=0, gather_groups=2)
    found = [line.partition("=")[0] for line in str(error.value).splitlines()]
    assert found == ["block_keys", "gather_groups", "heads"]


def test_local_arrays_are_refused():
    mesh = mesh_of(1, 2)
    by_sequence = {"in_specs": P(None, SEQ), "out_specs": P(None, SEQ)}
    with pytest.raises(ConfigError, match=r"this is inside a shard_map; call it outside, or .*attention\.make_attend"):
        jax.shard_map(lambda x: attention(x, x, x, mesh=mesh), mesh=mesh, **by_sequence)(X)


def test_forward_mode_is_refused_by_jax():
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):
        jax.jvp(lambda q: attention(q, X, X, mesh=mesh_of(1, 2)), (jnp.asarray(X),), (jnp.asarray(X),))


@pytest.mark.parametrize(
    ("of_layer", "of_call", "message"),
    [
        (
            {},
            {"mask": np.ones((1, 1, 43, 43), bool)},
            "a mask array of shape (1, 1, 43, 43) is refused, since L x L numbers are what no device should have: say",
        ),
        ({"dropout_rate": 0.1, "deterministic": False}, {}, "dropout_rate=0.1 is refused, since attention"),
        ({}, {"sow_weights": True}, "sow_weights=True is refused, since attention weights exist in blocks alone; use"),
        ({"precision": "highest"}, {}, "precision=highest is refused, since the way back would not know it; use"),
    ],
    ids=["mask", "dropout", "weights", "precision"],
)
def test_what_flax_can_and_this_cannot(of_layer, of_call, message):
    attend = lss_jax.attention_fn(mesh_of(1, 2))
    layer = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=attend, rngs=nnx.Rngs(0), **of_layer)
    with pytest.raises(ConfigError) as error:
        layer(jnp.ones((B, 43, 32)), **of_call)
    assert str(error.value).startswith(message)


def test_a_bias_is_refused():
    with pytest.raises(ConfigError, match=r"a bias of shape \(1, 1, 48, 48\) is refused, .*; use positions such as"):
        lss_jax.attention_fn(mesh_of(1, 2))(X, X, X, np.zeros((1, 1, 48, 48)))


def test_decoding_is_refused():
    attend = lss_jax.attention_fn(mesh_of(1, 2))
    layer = nnx.MultiHeadAttention(4, 32, decode=True, attention_fn=attend, rngs=nnx.Rngs(0))
    layer.init_cache((B, 43, 32))
    with pytest.raises(ConfigError, match="decode=True makes such a mask, too: decode with Flax's own attention"):
        layer(jnp.ones((B, 1, 32)))


# What is guessed


def test_defaults_are_those_of_the_config():
    config = base.get_config().attention
    defaults = {name: p.default for name, p in inspect.signature(attention).parameters.items() if name in config}
    assert defaults == {name: config[name] for name in defaults} | {"layout": "contiguous"}
    assert set(config) - set(defaults) == {"window"}, "which JAX calls local_window_size"


def test_arguments_have_the_names_that_jax_and_flax_give_them():
    ours, jaxs = (inspect.signature(f).parameters for f in (attention, jax.nn.dot_product_attention))
    shared = {"query", "key", "value", "is_causal", "local_window_size", "scale"}
    assert shared <= set(ours) & set(jaxs)
    assert all(ours[name].default == jaxs[name].default for name in shared)
    flaxs = inspect.signature(nnx.dot_product_attention).parameters
    assert set(inspect.signature(lss_jax.attention_fn(mesh_of(1, 2))).parameters) == set(flaxs) - {"promote_dtype"}


def test_importing_the_package_asks_for_no_device():
    program = "import lss_jax, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "3\n", done.stderr
