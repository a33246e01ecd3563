"""Attention on global arrays equals JAX's own, in values and gradients, on any mesh."""

import inspect
import subprocess
import sys
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mesh_of, sampled
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lss_jax
from configs import base
from lss_jax.attention.mask import packed
from lss_jax.attention.strategies import EXACT
from lss_jax.inspection.hlo import collectives
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE
from lss_jax.parallel.mesh import SEQ

pytestmark = pytest.mark.usefixtures("strict_ranks")
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
    for strategy in EXACT
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


OPTIONS = [{"kernel": "dense"}, {"head_groups": 2, "regather": True}, {"block_queries": 512, "block_keys": 256}]


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


@pytest.mark.parametrize("strategy", sampled(EXACT, ["lss"]))
def test_a_query_that_sees_nothing_has_a_row_of_zeros_and_no_gradient(strategy):
    found = with_gradients(
        partial(attention, mesh=mesh_of(1, 2), strategy=strategy, intervals=(5, np.where(np.arange(43) < 20, 9, 5))),
        arrays_of(43),
    )
    for name in ("o", "dq"):
        assert not found[name][:, 20:].any() and found[name][:, :20].any()
    assert not found["dv"][:, 9:].any()


@pytest.mark.parametrize("strategy", sampled(EXACT, ["lss"]))
def test_a_scale_rounds_nothing_in_bfloat16(strategy):
    """The root of 128 is no number of bfloat16, and Gemma and T5 call with `scale=1`."""
    random = np.random.default_rng(0)
    inputs = [jnp.asarray(random.standard_normal((1, 32, 2, 128)) / 8**0.5, jnp.bfloat16) for _ in range(3)]
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in inputs), scale=1.0)

    def rms(found):
        return float(jnp.sqrt(jnp.mean((found.astype(jnp.float32) - exact) ** 2)))

    ours = rms(attention(*inputs, mesh=mesh_of(1, 2), strategy=strategy, scale=1.0, **BLOCKS))
    assert ours < 1.1 * rms(jax.nn.dot_product_attention(*inputs, scale=1.0))


def test_a_scale_may_be_learned():
    *inputs, _ = arrays_of(43)
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda scale, attend=attend: (attend(*inputs, scale=scale) ** 2).sum()))(0.7)
        for attend in (partial(attention, mesh=mesh_of(1, 2)), jax.nn.dot_product_attention)
    )
    assert_close(ours, theirs, BOUND)


@pytest.mark.parametrize("strategy", EXACT)
def test_debugging_without_jit_takes_no_longer(strategy):
    """Eagerly, each operation of each block would be compiled for itself, by the thousand."""
    arrays = arrays_of(43)
    with jax.disable_jit():
        found = with_gradients(partial(attention, mesh=mesh_of(1, 4), strategy=strategy, is_causal=True), arrays)
    assert_close(found, of_jax(arrays, is_causal=True), BOUND)


def test_numbers_and_lists_are_taken_as_jax_takes_them():
    *inputs, _ = arrays_of(43, 2, (), 2)
    expected = jax.nn.dot_product_attention(*inputs, local_window_size=(3, 2), is_causal=True)
    for window in ([3, 2], np.array([3, 2]), (np.int64(3), jnp.int32(2))):
        found = attention(*(x.tolist() for x in inputs), mesh=mesh_of(1, 2), local_window_size=window, is_causal=True)
        assert_close(found, expected, BOUND)


def test_intervals_of_rows_and_of_queries_where_there_are_as_many_of_both():
    *inputs, _ = arrays_of(16, 2, (16,), 2)
    end = np.arange(1, 17)
    of_queries, of_rows = (
        attention(*inputs, mesh=mesh_of(2, 2), intervals=(0, bound)) for bound in (end[None], end[:, None])
    )
    assert_close(of_queries, jax.nn.dot_product_attention(*inputs, is_causal=True), BOUND)
    assert_close(of_rows, jax.nn.dot_product_attention(*inputs, key_value_seq_lengths=end.astype(np.int32)), BOUND)


# In somebody's program


def test_a_hessian_is_forward_mode_over_a_gradient():
    q, k, v, _ = arrays_of(43, 2, (), 2)

    def loss(attend, factor):
        return (attend(factor * q, k, factor * v) ** 2).mean()

    ours, theirs = (
        jax.hessian(partial(loss, attend))(1.0)
        for attend in (partial(attention, mesh=mesh_of(1, 2)), jax.nn.dot_product_attention)
    )
    assert_close(ours, theirs, BOUND)


def test_vmap_over_an_axis_that_an_explicit_mesh_shards():
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    *inputs, _ = arrays_of(48, 2, (2, 3), 2)
    placed = [jax.device_put(x, NamedSharding(mesh, P("data", None, "seq"))) for x in inputs]
    found = jax.vmap(partial(attention, mesh=mesh, axes=(None, "seq", None)))(*placed)
    assert_close(found, jax.vmap(jax.nn.dot_product_attention)(*inputs), BOUND)


@pytest.mark.parametrize("strategy", sampled(EXACT, ["lss"]))
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


@pytest.mark.parametrize("strategy", sampled(EXACT, ["lss"]))
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


# What is guessed


def test_defaults_are_those_of_the_config():
    config = base.get_config().attention
    defaults = {name: p.default for name, p in inspect.signature(attention).parameters.items() if name in config}
    assert defaults == {name: config[name] for name in defaults} | {"layout": "contiguous"}
    # what JAX calls local_window_size; of what is not exact; and of attention to another sequence
    others = {"window", "global_tokens", "features", "source_layout"}
    assert set(config) - set(defaults) == others


def test_importing_the_package_asks_for_no_device():
    program = "import lss_jax, jax; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "3\n", done.stderr
