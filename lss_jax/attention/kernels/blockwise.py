"""Blockwise attention: exact, in memory that is linear in the sequence, and no work where the mask shows nothing.

The softmax is taken block by block of keys with a running maximum and sum (Milakov & Gimelshein 2018, arXiv
1805.02867; Rabe & Staats 2021, arXiv 2112.05682). The backward pass recomputes the scores from each query's
log-sum-exp (Dao et al. 2022, arXiv 2205.14135). It is plain JAX: one program for CPU, GPU and TPU.

Keys and values are used as a gather leaves them, segments stacked in `kv_n2BGsK`, in no particular order: a table of
key blocks in natural order says where each lies. What a block of queries sees are neighbours in that table, so the loop
over key blocks runs from the first that is seen to the last. The letters are those of `blocks`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.kernels.blocks import (
    KeyBlocks,
    QueryBlocking,
    chunks_of_all,
    key_blocks,
    query_blocking,
    too_short,
    touched,
)
from lss_jax.attention.kernels.interface import Output, Queries, Residuals
from lss_jax.attention.mask import Intervals
from lss_jax.attention.pairs import QUERY_AXIS, Pairs, add_block, applied, bias_gradient, block_of
from lss_jax.attention.setting import Setting
from lss_jax.parallel.dropout import dropped
from lss_jax.parallel.residuals import ATTENDED
from lss_jax.parallel.varying import varying_like


def forward(queries: Queries, kv_N2BGlK: jax.Array, setting: Setting) -> Output:
    """Attention over the keys and values of all segments."""
    kv_n2BGsK, keys = _ordered(kv_N2BGlK, setting)
    blocking, blocks = in_blocks(queries, kv_N2BGlK.shape[3], keys, setting)
    softmax = accumulate(blocks, kv_n2BGsK, keys, nothing_yet(blocks))
    return output_of(blocking, softmax, queries.q_BlHK.dtype, setting)


def backward(residuals: Residuals, do_BlHK: jax.Array, setting: Setting) -> tuple[Queries, jax.Array]:
    """The gradients of the queries, and these queries' part of `dkv_N2BGKl` in float32."""
    queries, kv_N2BGlK, output = residuals
    kv_n2BGsK, keys = _ordered(kv_N2BGlK, setting)
    blocking, blocks = in_blocks(queries, kv_N2BGlK.shape[3], keys, setting)
    given, start = cotangents(blocking, output, do_BlHK), no_gradients(blocks, kv_n2BGsK)
    gradients = differentiate(blocks, kv_n2BGsK, keys, cotangents=given, gradients=start)
    dkv_n2BGKs = gradients.dkv_n2BGKs
    if ordered_first(kv_N2BGlK.shape[4], setting):
        dkv_n2BGKs = setting.key_layout.segments(dkv_n2BGKs[0], 4)
    return gradients.of_queries(queries, blocking), dkv_n2BGKs


def _ordered(kv_N2BGlK: jax.Array, setting: Setting) -> tuple[jax.Array, KeyBlocks]:
    """The keys as they lie and their blocks; runs too short for blocks are first put together in natural order."""
    keys = blocks_of_keys(kv_N2BGlK.shape[4], setting)
    if ordered_first(kv_N2BGlK.shape[4], setting):
        kv_N2BGlK = setting.key_layout.natural(kv_N2BGlK, 4)[None]
    return kv_N2BGlK, keys


def blocks_of_keys(segment_length: int, setting: Setting) -> KeyBlocks:
    """The blocks of all keys, in segments of this length, as the kernel has them."""
    if ordered_first(segment_length, setting):
        segment_length, setting = segment_length * setting.key_layout.devices, setting.unsharded
    return key_blocks(chunks_of_all(setting.key_layout, segment_length), setting.block_keys)


def ordered_first(segment_length: int, setting: Setting) -> bool:
    """Whether runs are too short for blocks of their own, so that keys are first put together in natural order."""
    layout = setting.key_layout
    return layout.devices > 1 and too_short(segment_length // layout.chunks_per_device, setting.block_keys)


class QueryBlocks(NamedTuple):
    """Queries in blocks of neighbours, with what goes with them; one scan takes them in turn."""

    q_igmK: jax.Array
    start_iq: jax.Array  # the intervals; empty for the padding, which is masked out
    end_iq: jax.Array
    row_i: jax.Array  # of the batch
    head_i: jax.Array  # the first of the key/value heads in the block
    stream_igm: jax.Array | None  # for dropout
    rate_i: jax.Array | None
    key_i: jax.Array | None  # for dropout: the natural position of the first key
    query_i: jax.Array | None  # the first query, for arrays over pairs


class Blocks(NamedTuple):
    """Queries in blocks, and what the scores of all blocks have in common."""

    queries: QueryBlocks
    scale: float
    pairs: Pairs | None  # of all queries, each run of them padded to whole blocks


def in_blocks(queries: Queries, kv_heads: int, keys: KeyBlocks, setting: Setting) -> tuple[QueryBlocking, Blocks]:
    """The local queries in blocks, and how these were made."""
    (q_BlHK, mask, dropout, pairs), largest = queries, (setting.block_queries, setting.block_keys)
    B, l, H, _ = q_BlHK.shape
    blocking = query_blocking((B, l, H, kv_heads), setting.layout, largest, key_block=keys.size)
    row_i, head_i = blocking.batch_rows_and_heads()
    stream_igm, rate_i, key_i = None, None, None
    if dropout is not None:
        stream_igm = blocking.split_per_head(dropout.stream_BlH)
        rate_i = jnp.full(len(row_i), dropout.rate, jnp.float32)
        key_i = None if dropout.first_B is None else dropout.first_B[row_i]
    of_queries = QueryBlocks(
        q_igmK=blocking.split(q_BlHK),
        start_iq=blocking.split_per_query(mask.start),
        end_iq=blocking.split_per_query(mask.end),
        row_i=row_i,
        head_i=head_i,
        stream_igm=stream_igm,
        rate_i=rate_i,
        key_i=key_i,
        query_i=pairs and blocking.first_queries(),
    )
    padded = jax.tree.map(lambda x: x if x.shape[QUERY_AXIS] == 1 else blocking.padded(x, QUERY_AXIS), pairs)
    return blocking, Blocks(of_queries, setting.scale_of(q_BlHK.shape[3]), padded)


class Softmax(NamedTuple):
    """The running softmax of each query over the keys so far, float32: at the end divide `o` by `sum`."""

    o_igmK: jax.Array
    max_igm: jax.Array
    sum_igm: jax.Array


def nothing_yet(blocks: Blocks) -> Softmax:
    """The running softmax before any key."""
    o_igmK = jnp.zeros_like(blocks.queries.q_igmK, jnp.float32)
    return Softmax(o_igmK, jnp.full_like(o_igmK[..., 0], -jnp.inf), o_igmK[..., 0])


def accumulate(blocks: Blocks, kv_n2BGsK: jax.Array, keys: KeyBlocks, softmax: Softmax) -> Softmax:
    """Takes these keys into the running softmax of every query that sees them."""

    def one_block_of_queries(_, inputs):
        queries, softmax = inputs

        def one_block_of_keys(t, softmax):
            o_gmK, max_gm, sum_gm = softmax
            k_gkK, v_gkK = _read(kv_n2BGsK, keys, t, queries)
            s_gmk = _scores(blocks, queries, k_gkK, keys, t)
            new_max_gm = jnp.maximum(max_gm, s_gmk.max(-1))
            shift_gm = jnp.where(new_max_gm == -jnp.inf, 0.0, new_max_gm)  # a query that has seen nothing yet
            p_gmk = jnp.exp(s_gmk - shift_gm[..., None])
            shrink_gm = jnp.exp(max_gm - shift_gm)
            sum_gm = sum_gm * shrink_gm + p_gmk.sum(-1)
            weighted_gmK = product("gmk,gkK->gmK", _dropped(p_gmk, queries, keys, t), v_gkK)
            return Softmax(o_gmK * shrink_gm[..., None] + weighted_gmK, new_max_gm, sum_gm)

        return None, _over_touched(keys, queries, one_block_of_keys, init=softmax, reads=(kv_n2BGsK, blocks.pairs))

    return jax.lax.scan(one_block_of_queries, None, (blocks.queries, softmax))[1]


def finish(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """The output and its log-sum-exp, float32: `o_igmK, lse_igm`; both zero for a query that saw nothing."""
    seen_igm = softmax.sum_igm > 0
    sum_igm = jnp.where(seen_igm, softmax.sum_igm, 1.0)
    lse_igm = jnp.where(seen_igm, softmax.max_igm, 0.0) + jnp.log(sum_igm)
    return softmax.o_igmK / sum_igm[..., None], lse_igm


def output_of(blocking: QueryBlocking, softmax: Softmax, dtype: Any, setting: Setting) -> Output:
    """The output once all keys have been met."""
    o_igmK, lse_igm = finish(softmax)
    lse_BlH = unblocked(blocking, softmax, lse_igm) if setting.scores.residual else None
    return checkpoint_name(Output(blocking.join(o_igmK).astype(dtype), lse_igm, lse_BlH), ATTENDED)


def unblocked(blocking: QueryBlocking, softmax: Softmax, lse_igm: jax.Array) -> jax.Array:
    """The log-sum-exp as `lse_BlH`, minus infinity for a query that saw nothing."""
    return blocking.join(jnp.where(softmax.sum_igm > 0, lse_igm, -jnp.inf)[..., None])[..., 0]


class Cotangents(NamedTuple):
    """What the backward pass knows of each query: `do`, the log-sum-exp, and the sum of `o * do` over `K`."""

    do_igmK: jax.Array
    lse_igm: jax.Array
    odo_igm: jax.Array


class Gradients(NamedTuple):
    """The gradients so far, float32.

    Those of keys and values lie with the keys along the last axis: `do^T p` is a product as it stands, `p^T do` would
    take twice the time for the transposition of the larger factor (XLA on CPU).
    """

    dq_igmK: jax.Array
    dkv_n2BGKs: jax.Array
    dbias_BHlL: jax.Array | None  # padded as the bias is

    def of_queries(self, queries: Queries, blocking: QueryBlocking) -> Queries:
        """Those of the queries and of their bias, in the dtypes of these."""
        dq_BlHK, dbias_BHlL = blocking.join(self.dq_igmK), self.dbias_BHlL
        if dbias_BHlL is not None and dbias_BHlL.shape[QUERY_AXIS] > 1:
            dbias_BHlL = blocking.cropped(dbias_BHlL, QUERY_AXIS)
        return queries.gradient(dq_BlHK, dbias_BHlL)


def no_gradients(blocks: Blocks, kv_n2BGsK: jax.Array) -> Gradients:
    """Zero gradients, to which blocks add theirs."""
    read = (blocks.queries.q_igmK, kv_n2BGsK.swapaxes(4, 5), blocks.pairs and blocks.pairs.bias_BHlL)
    return Gradients(*jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), read))


def cotangents(blocking: QueryBlocking, output: Output, do_BlHK: jax.Array) -> Cotangents:
    """What the backward pass knows of each query, in blocks like the queries."""
    odo_BlH = jnp.einsum("BlHK,BlHK->BlH", output.o_BlHK, do_BlHK, preferred_element_type=jnp.float32)
    return Cotangents(blocking.split(do_BlHK), output.lse, blocking.split_per_head(odo_BlH))


def differentiate(
    blocks: Blocks, kv_n2BGsK: jax.Array, keys: KeyBlocks, *, cotangents: Cotangents, gradients: Gradients
) -> Gradients:
    """The gradients so far, and what these queries and these keys contribute to one another's."""

    def one_block_of_queries(sums, inputs):
        queries, given, dq_gmK = inputs

        def one_block_of_keys(t, gradients):
            k_gkK, v_gkK = _read(kv_n2BGsK, keys, t, queries)
            p_gmk = jnp.exp(_scores(blocks, queries, k_gkK, keys, t) - given.lse_igm[..., None])
            dv_gKk = product("gmK,gmk->gKk", given.do_igmK, _dropped(p_gmk, queries, keys, t))
            dp_gmk = _dropped(product("gmK,gkK->gmk", given.do_igmK, v_gkK), queries, keys, t)
            ds_gmk = p_gmk * (dp_gmk - given.odo_igm[..., None])
            dbias_BHlL = _add_to_bias(gradients.dbias_BHlL, ds_gmk, blocks, queries, keys, t)
            ds_gmk = ds_gmk * blocks.scale
            dk_gKk = product("gmK,gmk->gKk", queries.q_igmK, ds_gmk)
            dq_gmK = gradients.dq_igmK + product("gmk,gkK->gmK", ds_gmk, k_gkK)
            d_2gKk = jnp.stack((dk_gKk, dv_gKk))
            dkv_n2BGKs = _add(gradients.dkv_n2BGKs, d_2gKk, at=_start_of(keys, t, queries))
            return Gradients(dq_gmK, dkv_n2BGKs, dbias_BHlL)

        so_far, reads = Gradients(dq_gmK, *sums), (kv_n2BGsK, given, blocks.pairs)
        dq_gmK, *sums = _over_touched(keys, queries, one_block_of_keys, init=so_far, reads=reads)
        return sums, dq_gmK

    sums = varying_like(list(gradients[1:]), (blocks, kv_n2BGsK, keys, cotangents, gradients))
    sums, dq_igmK = jax.lax.scan(one_block_of_queries, sums, (blocks.queries, cotangents, gradients.dq_igmK))
    return Gradients(dq_igmK, *sums)


def _over_touched(keys, queries, body, *, init, reads):
    """`body(t, carry)` over the key blocks that these queries touch; `reads` are the arrays that it reads."""
    bounds = touched(keys, queries.start_iq, queries.end_iq)
    (first, stop), init = varying_like((bounds, init), (keys, queries, reads, init))
    return jax.lax.fori_loop(first, stop, body, init)


def _read(kv_n2BGsK, keys, t, queries):
    """Keys and values of a block, `[g, k, K]` each."""
    _, pair, _, _, _, K = kv_n2BGsK.shape
    *at, offset = _start_of(keys, t, queries)
    sizes = (1, pair, 1, queries.q_igmK.shape[0], keys.size, K)
    return jax.lax.dynamic_slice(kv_n2BGsK, (*at, offset, 0), sizes)[0, :, 0]


def _start_of(keys, t, queries):
    """Where the keys and values of a block start: indices to `n2BGs`."""
    return keys.segment_t[t], 0, queries.row_i, queries.head_i, keys.offset_t[t]


def _add(dkv_n2BGKs, d_2gKk, at):
    """Adds the gradients of a block to those of all keys and values, where its own are stored."""
    at = (*at[:4], 0, at[4])
    d_121gKk = d_2gKk[None, :, None]
    before = jax.lax.dynamic_slice(dkv_n2BGKs, at, d_121gKk.shape)
    return jax.lax.dynamic_update_slice(dkv_n2BGKs, before + d_121gKk, at)


def _position_k(keys, t):
    return keys.first_t[t] + jnp.arange(keys.size, dtype=jnp.int32)


def _scores(blocks, queries, k_gkK, keys, t):
    """`s_gmk`, minus infinity where the query does not see the key."""
    s_gmk = product("gmK,gkK->gmk", queries.q_igmK, k_gkK) * blocks.scale
    position_k = _position_k(keys, t)
    seen_qk = Intervals(queries.start_iq, queries.end_iq).sees(position_k) & (position_k >= keys.begin_t[t])[None]
    if blocks.pairs is not None:
        at, sizes = _pairs_of(keys, t, queries)
        block = jax.tree.map(lambda x: block_of(x, at, sizes), blocks.pairs)
        s_gmk = applied(block, s_gmk[None], len(seen_qk))[0]
    return jnp.where(jnp.tile(seen_qk, (s_gmk.shape[1] // seen_qk.shape[0], 1)), s_gmk, -jnp.inf)


def _pairs_of(keys, t, queries):
    """Where arrays over pairs have a block of queries and one of keys: first row, head, query and key, and sizes."""
    (g, m, _), q = queries.q_igmK.shape, len(queries.start_iq)
    heads_per_kv = m // q
    at = (queries.row_i, queries.head_i * heads_per_kv, queries.query_i, keys.first_t[t])
    return at, (1, g * heads_per_kv, q, keys.size)


def _add_to_bias(dbias_BHlL, ds_gmk, blocks, queries, keys, t):
    """Adds the gradients of a block's scores to those of the bias, if there is one."""
    if dbias_BHlL is None:
        return None
    at, sizes = _pairs_of(keys, t, queries)
    block = block_of(blocks.pairs.bias_BHlL, at, sizes)
    return add_block(dbias_BHlL, bias_gradient(block, ds_gmk[None], len(queries.start_iq)), at)


def _dropped(x_gmk, queries, keys, t):
    if queries.stream_igm is None:
        return x_gmk
    position_k = _position_k(keys, t)
    if queries.key_i is not None:
        position_k = position_k + queries.key_i
    return dropped(x_gmk, queries.stream_igm[..., None], position_k, queries.rate_i)


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum in the dtype of the inputs, the narrower one, with float32 sums."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
