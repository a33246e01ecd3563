"""Blockwise attention: exact, in memory that is linear in the sequence, and no work where the mask shows nothing.

The softmax is taken block by block of keys with a running maximum and sum (Milakov & Gimelshein 2018, arXiv
1805.02867; Rabe & Staats 2021, arXiv 2112.05682). The backward pass computes the scores again from each row's
log-sum-exp (Dao et al. 2022, arXiv 2205.14135). It is plain JAX: one program for CPU, GPU and TPU.

Keys and values are used as a gather leaves them, segments stacked in `kv_n2BGsK`, in no particular order: a table of
key blocks in natural order says where each lies. What a block of queries sees are neighbours in that table, so the loop
over key blocks runs from the first that is seen to the last. The letters are those of `blocks`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.blocks import KeyBlocks, QueryCut, chunks_of_all, cut_queries, key_blocks, too_short, touched
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import ATTENDED, Setting
from lss_jax.dropout import PairDropout, dropped


def forward(
    q_BlHK: jax.Array, kv_N2BGlK: jax.Array, mask: Intervals, dropout: PairDropout | None, setting: Setting
) -> tuple[jax.Array, jax.Array]:
    """Attention rows `o_BlHK` over the keys and values of all segments, and the log-sum-exp of each.

    A query that sees nothing has a row of zeros.
    """
    kv_n2BGsK, keys = _ordered(kv_N2BGlK, setting)
    cut, queries = cut_and_blocks(q_BlHK, mask, dropout, kv_N2BGlK.shape[3], setting)
    o_ibGmK, lse_ibGm = finish(accumulate(queries, kv_n2BGsK, keys, nothing_yet(queries)))
    return checkpoint_name((cut.join(o_ibGmK).astype(q_BlHK.dtype), lse_ibGm), ATTENDED)


def backward(
    q_BlHK: jax.Array,
    kv_N2BGlK: jax.Array,
    mask: Intervals,
    dropout: PairDropout | None,
    o_BlHK: jax.Array,
    lse_ibGm: jax.Array,
    do_BlHK: jax.Array,
    setting: Setting,
) -> tuple[jax.Array, jax.Array]:
    """`dq_BlHK`, and this device's share of `dkv_N2BGKl` in float32."""
    kv_n2BGsK, keys = _ordered(kv_N2BGlK, setting)
    cut, queries = cut_and_blocks(q_BlHK, mask, dropout, kv_N2BGlK.shape[3], setting)
    back = cotangents(cut, o_BlHK, do_BlHK, lse_ibGm)
    dq_ibGmK, dkv_n2BGKs = differentiate(queries, kv_n2BGsK, keys, back, no_gradients(queries, kv_n2BGsK))
    if _scattered(kv_N2BGlK.shape[4], setting):
        dkv_n2BGKs = setting.layout.segments(dkv_n2BGKs[0], 4)
    return cut.join(dq_ibGmK).astype(do_BlHK.dtype), dkv_n2BGKs


def _ordered(kv_N2BGlK: jax.Array, setting: Setting) -> tuple[jax.Array, KeyBlocks]:
    """The keys as they lie and their blocks; runs too short for a block are first put together in natural order."""
    layout = setting.layout
    if _scattered(kv_N2BGlK.shape[4], setting):
        kv_N2BGlK, layout = layout.natural(kv_N2BGlK, 4)[None], setting.uncut.layout
    return kv_N2BGlK, key_blocks(chunks_of_all(layout, kv_N2BGlK.shape[4]), setting.block_keys)


def _scattered(segment_length: int, setting: Setting) -> bool:
    layout = setting.layout
    return layout.devices > 1 and too_short(segment_length // layout.chunks_per_device, setting.block_keys)


class QueryBlocks(NamedTuple):
    """Queries in blocks of neighbours, with what goes with them; one scan takes them in turn."""

    q_ibGmK: jax.Array
    start_iq: jax.Array  # the intervals; empty for the padding
    end_iq: jax.Array
    row_i: jax.Array  # of the batch, the first in the block
    stream_ibGm: jax.Array | None  # for dropout
    rate_i: jax.Array | None


def cut_and_blocks(
    q_BlHK: jax.Array, mask: Intervals, dropout: PairDropout | None, kv_heads: int, setting: Setting
) -> tuple[QueryCut, QueryBlocks]:
    """How the local queries are cut, and their blocks."""
    cut = cut_queries(q_BlHK, mask, kv_heads, setting.block_queries, setting.layout)
    q_ibGmK = cut.split(q_BlHK)
    index_i = jnp.arange(q_ibGmK.shape[0])
    row_i = index_i // (len(index_i) // cut.batch) if cut.by_row else 0 * index_i
    intervals_iq = (cut.split_rows(mask.start), cut.split_rows(mask.end))
    if dropout is None:
        return cut, QueryBlocks(q_ibGmK, *intervals_iq, row_i, None, None)
    stream_ibGm, rate_i = cut.split_scalars(dropout.stream_BlH), jnp.full(len(index_i), dropout.rate, jnp.float32)
    return cut, QueryBlocks(q_ibGmK, *intervals_iq, row_i, stream_ibGm, rate_i)


class Softmax(NamedTuple):
    """The running softmax of each query over the keys so far, float32: at the end divide `o` by `sum`."""

    o_ibGmK: jax.Array
    max_ibGm: jax.Array
    sum_ibGm: jax.Array


def nothing_yet(queries: QueryBlocks) -> Softmax:
    """The running softmax before any key."""
    o_ibGmK = jnp.zeros_like(queries.q_ibGmK, jnp.float32)
    return Softmax(o_ibGmK, jnp.full_like(o_ibGmK[..., 0], -jnp.inf), o_ibGmK[..., 0])


def accumulate(queries: QueryBlocks, kv_n2BGsK: jax.Array, keys: KeyBlocks, softmax: Softmax) -> Softmax:
    """Takes these keys into the running softmax of every query that sees them."""

    def one_block_of_queries(_, inputs):
        queries, softmax = inputs

        def one_block_of_keys(t, softmax):
            o_bGmK, max_bGm, sum_bGm = softmax
            k_bGkK, v_bGkK = _read(kv_n2BGsK, keys, t, queries)
            s_bGmk = _scores(queries, k_bGkK, keys, t)
            new_max_bGm = jnp.maximum(max_bGm, s_bGmk.max(-1))
            shift_bGm = jnp.where(new_max_bGm == -jnp.inf, 0.0, new_max_bGm)  # a row that has seen nothing yet
            p_bGmk = jnp.exp(s_bGmk - shift_bGm[..., None])
            shrink_bGm = jnp.exp(max_bGm - shift_bGm)
            sum_bGm = sum_bGm * shrink_bGm + p_bGmk.sum(-1)
            weighted_bGmK = _product("bGmk,bGkK->bGmK", _dropped(p_bGmk, queries, keys, t), v_bGkK)
            return Softmax(o_bGmK * shrink_bGm[..., None] + weighted_bGmK, new_max_bGm, sum_bGm)

        return None, _over_touched(keys, queries, kv_n2BGsK, one_block_of_keys, softmax)

    return jax.lax.scan(one_block_of_queries, None, (queries, softmax))[1]


def finish(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """Attention rows and log-sum-exp, float32: `o_ibGmK, lse_ibGm`; both zero for a query that saw nothing."""
    seen_ibGm = softmax.sum_ibGm > 0
    sum_ibGm = jnp.where(seen_ibGm, softmax.sum_ibGm, 1.0)
    lse_ibGm = jnp.where(seen_ibGm, softmax.max_ibGm, 0.0) + jnp.log(sum_ibGm)
    return softmax.o_ibGmK / sum_ibGm[..., None], lse_ibGm


class Cotangents(NamedTuple):
    """What the backward pass knows of each query: `do`, the log-sum-exp, and the sum of `o * do` over `K`."""

    do_ibGmK: jax.Array
    lse_ibGm: jax.Array
    odo_ibGm: jax.Array


class Gradients(NamedTuple):
    """Float32, and so far: of the queries, and of the keys and values.

    The latter lie with the keys along the last axis: `do^T p` is a product as it stands, `p^T do` would take twice the
    time for the transposition of the larger factor (XLA on CPU).
    """

    dq_ibGmK: jax.Array
    dkv_n2BGKs: jax.Array


def no_gradients(queries: QueryBlocks, kv_n2BGsK: jax.Array) -> Gradients:
    """Before any block."""
    return Gradients(
        jnp.zeros_like(queries.q_ibGmK, jnp.float32), jnp.zeros_like(kv_n2BGsK.swapaxes(4, 5), jnp.float32)
    )


def cotangents(cut: QueryCut, o_BlHK: jax.Array, do_BlHK: jax.Array, lse_ibGm: jax.Array) -> Cotangents:
    """By block, as the queries are."""
    odo_BlH = jnp.einsum("BlHK,BlHK->BlH", o_BlHK, do_BlHK, preferred_element_type=jnp.float32)
    return Cotangents(cut.split(do_BlHK), lse_ibGm, cut.split_scalars(odo_BlH))


def differentiate(
    queries: QueryBlocks, kv_n2BGsK: jax.Array, keys: KeyBlocks, back: Cotangents, gradients: Gradients
) -> Gradients:
    """Adds what these queries and these keys mean for one another."""

    def one_block_of_queries(dkv_n2BGKs, inputs):
        queries, back, dq_bGmK = inputs

        def one_block_of_keys(t, gradients):
            k_bGkK, v_bGkK = _read(kv_n2BGsK, keys, t, queries)
            p_bGmk = jnp.exp(_scores(queries, k_bGkK, keys, t) - back.lse_ibGm[..., None])
            dv_bGKk = _product("bGmK,bGmk->bGKk", back.do_ibGmK, _dropped(p_bGmk, queries, keys, t))
            dp_bGmk = _dropped(_product("bGmK,bGkK->bGmk", back.do_ibGmK, v_bGkK), queries, keys, t)
            ds_bGmk = p_bGmk * (dp_bGmk - back.odo_ibGm[..., None]) * _scale(k_bGkK)
            dk_bGKk = _product("bGmK,bGmk->bGKk", queries.q_ibGmK, ds_bGmk)
            dq_bGmK = gradients.dq_ibGmK + _product("bGmk,bGkK->bGmK", ds_bGmk, k_bGkK)
            return Gradients(dq_bGmK, _add(gradients.dkv_n2BGKs, jnp.stack((dk_bGKk, dv_bGKk)), keys, t, queries))

        so_far = Gradients(dq_bGmK, dkv_n2BGKs)
        dq_bGmK, dkv_n2BGKs = _over_touched(keys, queries, (kv_n2BGsK, back), one_block_of_keys, so_far)
        return dkv_n2BGKs, dq_bGmK

    dkv_n2BGKs = varying_like(gradients.dkv_n2BGKs, (queries, kv_n2BGsK, keys, back, gradients))
    dkv_n2BGKs, dq_ibGmK = jax.lax.scan(one_block_of_queries, dkv_n2BGKs, (queries, back, gradients.dq_ibGmK))
    return Gradients(dq_ibGmK, dkv_n2BGKs)


def varying_like(tree: Any, reference: Any) -> Any:
    """Inside `shard_map`: the arrays of `tree`, varying over all axes that any array of `reference` varies over.

    A loop's carry must vary from the start as all that goes into it.
    """
    zero = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(reference):
        zero = zero + jnp.zeros_like(leaf, shape=(), dtype=jnp.int32)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


def _over_touched(keys, queries, others, body, init):
    """`body(t, carry)` over the key blocks that these queries touch."""
    bounds = touched(keys, queries.start_iq, queries.end_iq)
    (first, stop), init = varying_like((bounds, init), (keys, queries, others, init))
    return jax.lax.fori_loop(first, stop, body, init)


def _read(kv_n2BGsK, keys, t, queries):
    _, pair, _, G, _, K = kv_n2BGsK.shape
    at = (keys.segment_t[t], 0, queries.row_i, 0, keys.place_t[t], 0)
    return jax.lax.dynamic_slice(kv_n2BGsK, at, (1, pair, queries.q_ibGmK.shape[0], G, keys.size, K))[0]


def _add(dkv_n2BGKs, d_2bGKk, keys, t, queries):
    at = (keys.segment_t[t], 0, queries.row_i, 0, 0, keys.place_t[t])
    before = jax.lax.dynamic_slice(dkv_n2BGKs, at, (1, *d_2bGKk.shape))
    return jax.lax.dynamic_update_slice(dkv_n2BGKs, before + d_2bGKk, at)


def _position_k(keys, t):
    return keys.first_t[t] + jnp.arange(keys.size, dtype=jnp.int32)


def _scores(queries, k_bGkK, keys, t):
    """`s_bGmk`, minus infinity where the query does not see the key."""
    s_bGmk = _product("bGmK,bGkK->bGmk", queries.q_ibGmK, k_bGkK) * _scale(k_bGkK)
    position_k = _position_k(keys, t)
    seen_qk = Intervals(queries.start_iq, queries.end_iq).sees(position_k) & (position_k >= keys.begin_t[t])
    return jnp.where(jnp.tile(seen_qk, (s_bGmk.shape[2] // seen_qk.shape[0], 1)), s_bGmk, -jnp.inf)


def _dropped(x_bGmk, queries, keys, t):
    if queries.stream_ibGm is None:
        return x_bGmk
    return dropped(x_bGmk, queries.stream_ibGm, _position_k(keys, t), queries.rate_i)


def _scale(k_bGkK) -> float:
    return k_bGkK.shape[-1] ** -0.5


def _product(equation, a, b):
    """In the dtype of the inputs, the narrower one, with float32 sums."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
