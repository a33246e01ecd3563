"""Every argument of `jax.nn.dot_product_attention`, alone and with others, is what it is to JAX, on every mesh.

The cases are of JAX's documentation; none of them is of JAX's own tests. What is refused is in
`test_refused_attention`. Where JAX gives a query that sees nothing the mean of all values, ours has zeros: such rows
are compared with zeros, and have no part in the gradients.
"""

import inspect
from collections.abc import Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, mesh_of, relative_error, sampled

import lss_jax
from lss_jax.attention.pair_arrays import as_intervals
from lss_jax.attention.strategies import EXACT
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE
from lss_jax.parallel.mesh import SEQ

pytestmark = pytest.mark.usefixtures("strict_ranks")
B, H, K = 2, 40, 8  # 2, 5 and 8 devices divide the heads, for Ulysses
L = 43  # which no mesh divides
BOUND = 1e-5
BLOCKS = {"block_queries": 8, "block_keys": 8}
attention = lss_jax.dot_product_attention


class Case(NamedTuple):
    """A call: the sizes of queries and keys, and the arguments of both functions."""

    queries: int = L
    keys: int = L
    kv_heads: int = 10
    rows: tuple[int, ...] = (B,)
    arguments: Mapping[str, Any] = MappingProxyType({})

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Random `q, k, v`."""
        random = np.random.default_rng(self.queries)
        sizes = ((self.queries, H), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
        return tuple(random.standard_normal((*self.rows, *size, K), np.float32) for size in sizes)

    @property
    def seen(self) -> np.ndarray:
        """Which keys each query sees, `[rows, H, queries, keys]`, by the definitions in JAX's documentation."""
        of = {"is_causal": False, "local_window_size": None, "mask": True, **self.arguments}
        query, key = np.arange(self.queries)[:, None], np.arange(self.keys)
        seen = np.broadcast_to(of["mask"], (*self.rows, H, self.queries, self.keys))
        if of["is_causal"]:
            seen = seen & (key <= query)
        if of["local_window_size"] is not None:
            left, right = np.broadcast_to(of["local_window_size"], 2)
            seen = seen & (query - left <= key) & (key <= query + right)
        for name, position in (("query_seq_lengths", query), ("key_value_seq_lengths", key)):
            if name in of:
                seen = seen & (position < of[name].reshape(*self.rows, 1, 1, 1))
        return seen

    @property
    def sees_any(self) -> np.ndarray:
        """Which queries see anything, `[rows, queries, H]`."""
        return np.moveaxis(self.seen.any(-1), -2, -1)


def lengths(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def shown(*shape: int, first: bool = True) -> np.ndarray:
    """A random mask that is no intervals; if `first`, every query sees the first key."""
    mask = np.random.default_rng(2).random(shape) < 0.7
    return mask | (first & (np.arange(shape[-1]) == 0))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape, np.float32)


CASES = {
    "all": Case(),
    "one key/value head": Case(kv_heads=1, arguments={"is_causal": True}),
    "as many heads of both": Case(kv_heads=H, arguments={"is_causal": True}),
    "no batch": Case(rows=(), arguments={"is_causal": True, "scale": 0.3}),
    "scale": Case(arguments={"scale": 1.0}),
    "window": Case(arguments={"local_window_size": (3, 9)}),
    "causal, window": Case(arguments={"is_causal": True, "local_window_size": 4}),
    "lengths of keys": Case(arguments={"key_value_seq_lengths": lengths(30, 3)}),
    "lengths of queries": Case(arguments={"query_seq_lengths": lengths(11, 43)}),
    "lengths, causal": Case(
        arguments={
            "is_causal": True,
            "query_seq_lengths": lengths(40, 7),
            "key_value_seq_lengths": lengths(20, 5),
        }
    ),
    "lengths, window, no batch": Case(
        rows=(), arguments={"key_value_seq_lengths": lengths(20), "local_window_size": (30, 0)}
    ),
    "more keys": Case(queries=13, keys=50),
    "more keys, causal": Case(queries=13, keys=50, arguments={"is_causal": True}),
    "more keys, lengths": Case(queries=13, keys=50, arguments={"key_value_seq_lengths": lengths(50, 9)}),
    "more queries, window": Case(queries=50, keys=13, arguments={"local_window_size": (20, 2)}),
    "more queries, causal": Case(queries=50, keys=13, arguments={"is_causal": True}),
    "mask": Case(arguments={"mask": shown(B, 1, L, L, first=False)}),
    "mask by head": Case(arguments={"mask": shown(1, H, L, L)}),
    "mask of keys": Case(arguments={"mask": shown(B, 1, 1, L)}),
    "mask of queries": Case(arguments={"mask": shown(B, 1, L, 1, first=False)}),
    "mask that is lengths": Case(arguments={"mask": np.arange(L) < np.array([30, 3])[:, None, None, None]}),
    "mask that is causal": Case(arguments={"mask": np.tri(L, dtype=bool)}),
    "mask, causal, window, lengths": Case(
        arguments={
            "mask": shown(B, H, L, L),
            "is_causal": True,
            "local_window_size": (30, 3),
            "key_value_seq_lengths": lengths(40, 20),
        }
    ),
    "more keys, mask": Case(queries=13, keys=50, arguments={"mask": shown(B, 1, 13, 50), "is_causal": True}),
    "bias": Case(arguments={"bias": numbers(B, H, L, L)}),
    "bias by head": Case(arguments={"bias": numbers(1, H, L, L), "is_causal": True}),
    "bias by head and key": Case(arguments={"bias": numbers(1, H, 1, L), "scale": 0.3}),
    "bias by row and key": Case(arguments={"bias": numbers(B, 1, 1, L), "local_window_size": 9}),
    "bias, no batch": Case(rows=(), arguments={"bias": numbers(H, L, L), "is_causal": True}),
    "bias, mask": Case(kv_heads=H, arguments={"bias": numbers(1, 1, L, L), "mask": shown(B, 1, 1, L)}),
    "more queries, bias": Case(queries=50, keys=13, arguments={"bias": numbers(1, H, 50, 13)}),
    "one query, mask, bias": Case(
        queries=1, keys=64, arguments={"mask": shown(B, 1, 1, 64), "bias": numbers(B, H, 1, 64)}
    ),
    "one query": Case(queries=1, keys=64, arguments={"key_value_seq_lengths": lengths(64, 30)}),
}


def results(attend, case: Case) -> dict[str, jax.Array]:
    """The output, the log-sum-exp and the gradients, by name."""

    def loss(arrays):
        o, lse = attend(**arrays, **others, return_residual=True)
        return (jnp.where(case.sees_any[..., None], o, 0.0) * weight).sum(), (o, lse)

    names = ("query", "key", "value")
    arrays = dict(zip(names, case.arrays, strict=True))
    arrays |= {name: case.arguments[name] for name in ("bias",) if name in case.arguments}
    others = {name: value for name, value in case.arguments.items() if name not in arrays}
    weight = np.random.default_rng(1).standard_normal(case.arrays[0].shape, np.float32)
    (_, (o, lse)), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return {"o": o, "lse": lse} | {f"d{name}": gradient for name, gradient in gradients.items()}


@cache
def expected(name: str) -> dict[str, np.ndarray]:
    """JAX's own results, with zeros and minus infinity for queries that see nothing."""
    case = CASES[name]
    found = jax.jit(partial(results, jax.nn.dot_product_attention, case))()
    o, lse = np.where(case.sees_any[..., None], found["o"], 0.0), np.where(case.sees_any, found["lse"], -np.inf)
    return found | {"o": o, "lse": lse}


def finite(found: dict[str, Any]) -> dict[str, Any]:
    """The same with a log-sum-exp that can be subtracted."""
    return found | {"lse": np.where(np.isneginf(found["lse"]), -1e3, found["lse"])}


MESHES = [(1, 8, 1), (2, 2, 2), (1, 5, 1)]
PROGRAMS = [(strategy, layout) for strategy in EXACT for layout in CHUNKS_PER_DEVICE]
GRID = [  # every case with every strategy and layout, each on a mesh in turn
    (name, *program, MESHES[(n + turn) % len(MESHES)])
    for n, name in enumerate(CASES)
    for turn, program in enumerate(PROGRAMS)
]
SAMPLE = [GRID[len(PROGRAMS) * n + n % len(PROGRAMS)] for n in range(len(CASES))]  # one program for each case


@pytest.mark.parametrize("case", sampled(GRID, SAMPLE), ids=lambda case: "-".join(map(str, case)))
def test_values_and_gradients_are_those_of_jax(case):
    name, strategy, layout, sizes = case
    ours = partial(attention, mesh=mesh_of(*sizes), strategy=strategy, layout=layout, **BLOCKS)
    found = jax.jit(partial(results, ours, CASES[name]))()
    assert_close(finite(found), finite(expected(name)), BOUND)


OPTIONS = [
    {"kernel": "dense"},
    {"head_groups": 2, "regather": True},
    {"strategy": "ulysses", "head_groups": 5, "layout": "zigzag"},
]


BY_OPTIONS = [
    (name, n)
    for name in ("lengths, causal", "bias", "bias, mask", "bias by head and key", "mask by head")
    for n in range(len(OPTIONS))
]


@pytest.mark.parametrize("case", sampled(BY_OPTIONS, BY_OPTIONS[::4]), ids=str)
def test_no_option_changes_the_result(case):
    name, n = case
    ours = partial(attention, mesh=mesh_of(1, 2), **BLOCKS, **OPTIONS[n])
    found = jax.jit(partial(results, ours, CASES[name]))()
    assert_close(finite(found), finite(expected(name)), BOUND)


TRACED = ["mask that is lengths", "mask that is causal", "bias, mask"]


@pytest.mark.parametrize("name", sampled(TRACED, TRACED[:1]))
def test_a_mask_that_is_traced_is_read_as_an_array(name):
    case = CASES[name]
    mask, others = case.arguments["mask"], {key: x for key, x in case.arguments.items() if key != "mask"}

    @jax.jit
    def found(mask):
        ours = partial(attention, mesh=mesh_of(2, 2), mask=mask, **BLOCKS)
        return results(ours, case._replace(arguments=others))

    assert_close(finite(found(mask)), finite(expected(name)), BOUND)


def test_vmap_over_masks_and_biases():
    q, k, v = CASES["all"].arrays
    masks, biases = shown(3, 1, 1, L, L), numbers(3, 1, H, 1, L)

    def over_both(attend):
        return jax.vmap(lambda mask, bias: attend(q, k, v, bias, mask))(masks, biases)

    assert_close(over_both(partial(attention, mesh=mesh_of(2, 2))), over_both(jax.nn.dot_product_attention), BOUND)


def test_a_mask_of_four_axes_for_arrays_of_three():
    q, k, v = CASES["no batch"].arrays
    expected = jax.nn.dot_product_attention(q, k, v, mask=shown(1, H, L, L))
    assert_close(attention(q, k, v, mask=shown(1, H, L, L), mesh=mesh_of(1, 2)), expected, BOUND)


def test_a_batch_of_two_axes_and_arrays_that_have_one_of_them():
    q, k, v = (np.random.default_rng(n).standard_normal((3, 2, L, 4, K), np.float32) for n in range(3))
    mask, bias = shown(2, 1, L, L), numbers(3, 1, 4, 1, L)
    found = attention(q, k, v, bias, mask, mesh=mesh_of(2, 2), **BLOCKS)
    expected = jax.vmap(lambda q, k, v, bias: jax.nn.dot_product_attention(q, k, v, bias, mask))(q, k, v, bias)
    assert_close(found, expected, BOUND)


@pytest.mark.parametrize("numbers_of", [np, jnp])
def test_masks_that_are_intervals_are_found(numbers_of):
    random, shape = np.random.default_rng(0), (3, L, H, K)
    start, end = np.sort(random.integers(0, L + 1, (2, 3, L)), 0)
    key_L = np.arange(L)
    shown_BLL = (start[..., None] <= key_L) & (key_L < end[..., None])
    for mask in (shown_BLL[:, None], shown_BLL[:1, None], shown_BLL[:, None, :1], shown_BLL[:, None, :, 5:6]):
        found = as_intervals(numbers_of.asarray(mask), shape, L)
        assert found.start.shape in ((L,), (3, L))
        np.testing.assert_array_equal(
            np.broadcast_to(found.sees(key_L), (3, L, L)), np.broadcast_to(mask[:, 0], (3, L, L))
        )
    holes, by_head = shown_BLL[:, None].copy(), np.repeat(shown_BLL[:, None], H, 1)
    holes[1, 0, 7, [0, 9]] = True, True
    holes[1, 0, 7, 5] = False
    by_head[2, 3, 4] ^= True
    for mask in (holes, by_head):
        assert as_intervals(numbers_of.asarray(mask), shape, L) is None


@pytest.mark.parametrize("strategy", sampled(EXACT, ["lss"]))
def test_a_mask_array_costs_its_own_memory(strategy):
    """Each device has the rows of its own queries; the scores still exist in blocks. Ulysses gathers the rows."""
    N, length = 4, 2048
    mesh = mesh_of(1, N)
    whole, rows = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P(None, None, SEQ)))
    x = jax.ShapeDtypeStruct((1, length, 4, K), jnp.float32, sharding=whole)
    mask = jax.ShapeDtypeStruct((1, 1, length, length), bool, sharding=rows)

    def temporaries(*masks):
        def loss(q, k, v, *masks):
            ours = partial(attention, mesh=mesh, strategy=strategy, block_queries=128, block_keys=128)
            return (ours(q, k, v, None, *masks) ** 2).sum()

        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, *masks)
        return program.compile().memory_analysis().temp_size_in_bytes

    size = length**2 // (1 if strategy == "ulysses" else N)
    assert temporaries(mask) - temporaries() < 1.1 * size


def own_of(real):
    """A collective that gives every device what it has of its own, where arrays over pairs are exchanged."""

    def dropped(x, axis, **options):
        if options:
            return x if x.ndim == 5 else real(x, axis, **options)
        return jnp.stack([x] * jax.lax.axis_size(axis)) if x.ndim == 4 else real(x, axis)

    return dropped


@pytest.mark.parametrize(("collective", "name"), [("all_gather", "mask"), ("all_to_all", "bias by head")])
def test_a_dropped_collective_is_seen(monkeypatch, collective, name):
    monkeypatch.setattr(jax.lax, collective, own_of(getattr(jax.lax, collective)))
    jax.clear_caches()
    ours = partial(attention, mesh=mesh_of(1, 2), strategy="ulysses", **BLOCKS)
    found = jax.jit(partial(results, ours, CASES[name]))()
    jax.clear_caches()
    with pytest.raises(AssertionError, match="relative error not under"):
        assert_close(finite(found), finite(expected(name)), BOUND)


def test_the_log_sum_exp_has_no_gradient():
    q, k, v = CASES["all"].arrays

    def loss(q):
        return attention(q, k, v, mesh=mesh_of(1, 2), return_residual=True)[1].sum()

    assert not jax.grad(loss)(q).any()


DTYPES = [("float16",) * 3, ("bfloat16",) * 3, ("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float32")]


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("strategy", sampled(EXACT, ["lss"]))
def test_dtypes_are_promoted(strategy, dtypes):
    inputs = [jnp.asarray(x, dtype) for x, dtype in zip(CASES["all"].arrays, dtypes, strict=True)]
    together = jnp.result_type(*inputs)

    def gradients(attend, inputs):
        return jax.value_and_grad(lambda q: (attend(q, *inputs[1:]).astype(jnp.float32) ** 2).mean())(inputs[0])

    found = gradients(partial(attention, mesh=mesh_of(1, 2), strategy=strategy, **BLOCKS), inputs)
    theirs = gradients(jax.nn.dot_product_attention, [x.astype(jnp.float32) for x in inputs])
    assert attention(*inputs, mesh=mesh_of(1, 2)).dtype == together
    for one, other in zip(found, theirs, strict=True):
        assert relative_error(one, other) < {"float32": 1e-2, "bfloat16": 3e-2, "float16": 5e-3}[str(together)]


def test_a_mesh_with_explicit_axes_places_the_log_sum_exp_as_the_queries():
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    inputs = [
        jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "seq"))) for x in Case(keys=48, queries=48).arrays
    ]
    found = jax.jit(partial(attention, mesh=mesh, return_residual=True))(*inputs)
    assert [x.sharding.spec[:2] for x in found] == [("data", "seq")] * 2
    assert_close(found, jax.nn.dot_product_attention(*map(np.asarray, inputs), return_residual=True), BOUND)


def test_the_signature_is_that_of_jax():
    ours, theirs = (inspect.signature(f).parameters for f in (attention, jax.nn.dot_product_attention))
    assert [(p.name, p.kind, p.default) for p in ours.values()][: len(theirs)] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours if name not in theirs)


def test_the_arguments_of_attention_fn_are_those_of_flax():
    ours, theirs = (
        inspect.signature(f).parameters for f in (lss_jax.attention_fn(mesh_of(1, 2)), nnx.dot_product_attention)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [p.default for p in ours.values()][: len(theirs)] == [p.default for p in theirs.values()]
