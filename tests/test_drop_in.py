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
from lss_jax.attention.strategies import EXACT
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE

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
        """Which keys each query sees, `[rows, 1, queries, keys]`, by the definitions in JAX's documentation."""
        of = {"is_causal": False, "local_window_size": None, "mask": True, **self.arguments}
        query, key = np.arange(self.queries)[:, None], np.arange(self.keys)
        seen = np.broadcast_to(of["mask"], (*self.rows, 1, self.queries, self.keys))
        if of["is_causal"]:
            seen = seen & (key <= query)
        if of["local_window_size"] is not None:
            left, right = np.broadcast_to(of["local_window_size"], 2)
            seen = seen & (query - left <= key) & (key <= query + right)
        for name, position in (("query_seq_lengths", query), ("key_value_seq_lengths", key)):
            if name in of:
                seen = seen & (position < of[name].reshape(*self.rows, 1, 1, 1))
        return seen


def lengths(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


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
    "one query": Case(queries=1, keys=64, arguments={"key_value_seq_lengths": lengths(64, 30)}),
}


def results(attend, case: Case) -> dict[str, jax.Array]:
    """The output, the log-sum-exp and the gradients, by name."""
    seen_BL = case.seen.any(-1)[..., 0, :]

    def loss(arrays):
        o, lse = attend(**arrays, **others, return_residual=True)
        return (jnp.where(seen_BL[..., None, None], o, 0.0) * weight).sum(), (o, lse)

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
    seen_BL1 = case.seen.any(-1)[..., 0, :, None]
    o, lse = np.where(seen_BL1[..., None], found["o"], 0.0), np.where(seen_BL1, found["lse"], -np.inf)
    return found | {"o": o, "lse": lse}


def finite(found: dict[str, Any]) -> dict[str, Any]:
    """The same with a log-sum-exp that can be subtracted."""
    return found | {"lse": np.where(np.isneginf(found["lse"]), -1e3, found["lse"])}


MESHES = [(1, 8, 1), (2, 2, 2), (1, 5, 1)]
PROGRAMS = [(strategy, layout, sizes) for strategy in EXACT for layout in CHUNKS_PER_DEVICE for sizes in MESHES]
SAMPLE = [("lss", "zigzag", (2, 2, 2)), ("ring", "contiguous", (1, 5, 1)), ("ulysses", "zigzag", (1, 8, 1))]


@pytest.mark.parametrize("program", sampled(PROGRAMS, SAMPLE), ids=lambda program: "-".join(map(str, program)))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_jax(program, name):
    strategy, layout, sizes = program
    ours = partial(attention, mesh=mesh_of(*sizes), strategy=strategy, layout=layout, **BLOCKS)
    found = jax.jit(partial(results, ours, CASES[name]))()
    assert_close(finite(found), finite(expected(name)), BOUND)


KERNELS = ["dense", "blockwise"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_and_groups_of_heads_give_the_log_sum_exp(kernel):
    name = "lengths, causal"
    ours = partial(attention, mesh=mesh_of(1, 2), kernel=kernel, head_groups=2, **BLOCKS)
    found = jax.jit(partial(results, ours, CASES[name]))()
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
    theirs = {name: p for name, p in theirs.items() if name not in ("bias", "mask")}
    assert [(p.name, p.kind, p.default) for p in ours.values()][: len(theirs)] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours if name not in theirs)


def test_the_arguments_of_attention_fn_are_those_of_flax():
    ours, theirs = (
        inspect.signature(f).parameters for f in (lss_jax.attention_fn(mesh_of(1, 2)), nnx.dot_product_attention)
    )
    assert list(ours)[: len(theirs) - 2] == [name for name in theirs if name != "promote_dtype"][:-1]
