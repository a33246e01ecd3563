"""Attention alone: each strategy inside `shard_map` against `jax.nn.dot_product_attention` on whole arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, mesh_of, relative_error
from jax.sharding import PartitionSpec as P

from lss_jax.attention import STRATEGIES
from lss_jax.attention.dense import attention_rows
from lss_jax.attention.lss import fused_all_gather
from lss_jax.attention.mask import Intervals, causal
from lss_jax.config import AttentionConfig, DataConfig, ModelConfig
from lss_jax.data.sources import SOURCES
from lss_jax.mesh import DATA, SEQ, over_cut_axes
from lss_jax.models import FAMILIES

B, L, H, K = 4, 24, 4, 8


def inputs(kv_heads=H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, L, H, K), (B, L, kv_heads, K), (B, L, kv_heads, K), (B, L, H, K)]
    return [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def on_mesh(strategy, data, seq):
    """The strategy as a function of whole arrays."""
    mesh = mesh_of(data, seq)
    spec = over_cut_axes(P(DATA, SEQ), mesh)
    positions_spec = over_cut_axes(P(SEQ), mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, spec, positions_spec), out_specs=spec)
    def attention(q, k, v, positions_l):
        return STRATEGIES[strategy](q, k, v, mask=causal(positions_l), axis=SEQ if seq > 1 else None)

    return lambda q, k, v: attention(q, k, v, jnp.arange(L))


def values_and_gradients(attention, q, k, v, weights):
    def scalar(q, k, v):
        o = attention(q, k, v)
        return jnp.sum(o.astype(jnp.float32) * weights.astype(jnp.float32)), o

    gradients, o = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return dict(zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True))


def reference(kv_heads):
    return values_and_gradients(partial(jax.nn.dot_product_attention, is_causal=True), *inputs(kv_heads))


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize(("data", "seq"), [(1, 1), (1, 2), (1, 3), (2, 3), (2, 4), (1, 8)])
def test_lss_equals_attention_on_whole_arrays(data, seq, kv_heads):
    assert_close(values_and_gradients(on_mesh("lss", data, seq), *inputs(kv_heads)), reference(kv_heads), 1e-5)


@pytest.mark.parametrize("kv_heads", [H, 2])
def test_dense_equals_attention_on_whole_arrays(kv_heads):
    assert_close(values_and_gradients(on_mesh("dense", 4, 1), *inputs(kv_heads)), reference(kv_heads), 1e-5)


def test_bfloat16_inputs_accumulate_in_float32():
    """Inputs rounded to 8 bits: each result within 2% of float32 attention over the same rounded inputs."""
    rounded = inputs(dtype=jnp.bfloat16)
    found = values_and_gradients(on_mesh("lss", 1, 4), *rounded)
    assert all(value.dtype == jnp.bfloat16 for value in found.values())
    exact = values_and_gradients(
        partial(jax.nn.dot_product_attention, is_causal=True), *(x.astype(jnp.float32) for x in rounded)
    )
    assert_close(found, exact, 2e-2)


def test_intervals_are_half_open_and_in_natural_positions():
    q, k, v, _ = inputs()
    start, end = jnp.arange(L) // 3, jnp.arange(L) // 2 + 12
    found = attention_rows(q, k, v, Intervals(start, end))
    seen = (start[:, None] <= jnp.arange(L)) & (jnp.arange(L) < end[:, None])
    assert relative_error(found, jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])) < 1e-5


def test_no_output_depends_on_a_later_token():
    q, k, v, _ = inputs()
    jacobian = jax.jacobian(lambda k, v: on_mesh("lss", 1, 4)(q, k, v).sum((0, 2, 3)), argnums=(0, 1))(k, v)
    for derivative in jacobian:
        size_LL = np.abs(np.asarray(derivative)).sum((1, 3, 4))
        assert np.all(size_LL[np.triu_indices(L, 1)] == 0)
        assert np.all(size_LL[:, 0][1:] > 0), "and every output does depend on the first"


def test_the_gather_returns_segments_in_order_and_its_transpose_adds_them_up():
    """Rank-coded: device i holds i; it gets all of them, and the sum of what all devices say of its own."""
    mesh = mesh_of(1, 8)
    ranks = jnp.broadcast_to(jnp.arange(8.0).repeat(2)[:, None, None], (2, 1, 16, 1, 1))

    @partial(jax.shard_map, mesh=mesh, in_specs=P(None, None, SEQ), out_specs=(P(SEQ), P(None, None, SEQ)))
    def gather_and_back(x):
        whole, transpose = jax.vjp(lambda x: fused_all_gather(x, SEQ), x)
        weight = 10.0 ** jax.lax.axis_index(SEQ)
        return whole[None, 0, 0, :, 0, 0], transpose(whole * weight)[0]

    whole, back = gather_and_back(ranks)
    np.testing.assert_array_equal(whole, np.tile(np.arange(8.0).repeat(2), (8, 1)))
    np.testing.assert_array_equal(back, np.asarray(ranks) * 11_111_111)


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [(AttentionConfig, "strategy", STRATEGIES), (ModelConfig, "family", FAMILIES), (DataConfig, "source", SOURCES)],
)
def test_the_config_names_what_there_is(section, key, known):
    assert set(section.__annotations__[key].__args__) == set(known)
