"""The blockwise algorithm as fused kernels in Pallas, for GPUs ("triton") and TPUs ("mosaic"): scores stay on the chip.

The mathematics is that of `blockwise`. A program of the grid takes one block of one head's queries past the blocks of
keys that it touches; in the backward pass another takes one block of keys past the queries that touch it. Scores are
`s_km`, keys down and queries across, so that a number per query is a row of a matrix. The letters are those of `tiles`;
names in `_ref` are arrays as a program sees them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from lss_jax.attention.kernels.interface import Output, Queries, Residuals
from lss_jax.attention.kernels.targets import Target
from lss_jax.attention.kernels.tiles import END, START, STREAM, Tables, Tiling, facts, tiling_of
from lss_jax.attention.mask import lifted
from lss_jax.attention.setting import Setting
from lss_jax.parallel.dropout import dropped
from lss_jax.parallel.residuals import ATTENDED

LSE, ODO = range(2)  # rows of `floats_BHj2m`


def forward(queries: Queries, kv_N2BGlK: jax.Array, setting: Setting, target: Target) -> Output:
    """Attention over the keys and values of all segments; the log-sum-exp is `lse_BHj1m`."""
    q_BlHK = queries.q_BlHK
    tiling = tiling_of(queries, kv_N2BGlK, setting, target)
    tables, _, ints_BHj3m = facts(tiling, queries)
    q_BHjmK, kv_n2BGsK = tiling.split_queries(q_BlHK), tiling.split_keys(kv_N2BGlK)
    *grid, m, K = q_BHjmK.shape
    o_BHjmK, lse_BHj1m = _call(
        _outputs,
        tiling,
        tables,
        grid=grid,
        inputs=[(q_BHjmK, _own), (ints_BHj3m, _own), (kv_n2BGsK, _anywhere)],
        outputs=[(q_BHjmK, _own), (jax.ShapeDtypeStruct((*grid, 1, m), jnp.float32), _own)],
        walked=[(tiling.key_size, K, kv_n2BGsK.dtype)] * 2,
    )
    lse_BlH = None
    if setting.scores.residual:
        sees = queries.mask.start < queries.mask.end
        lse_BlH = jnp.where(lifted(sees[..., None], 3), tiling.join_per_head(lse_BHj1m), -jnp.inf)
    return checkpoint_name(Output(tiling.join_queries(o_BHjmK, q_BlHK.shape[3]), lse_BHj1m, lse_BlH), ATTENDED)


def backward(residuals: Residuals, do_BlHK: jax.Array, setting: Setting, target: Target) -> tuple[Queries, jax.Array]:
    """The gradients of the queries, and these queries' part of `dkv_N2BGKl` in float32."""
    queries, kv_N2BGlK, (o_BlHK, lse_BHj1m, _) = residuals
    q_BlHK = queries.q_BlHK
    tiling = tiling_of(queries, kv_N2BGlK, setting, target)
    tables, tables_of_keys, ints_BHj3m = facts(tiling, queries)
    odo_BlH = jnp.einsum("BlHK,BlHK->BlH", o_BlHK, do_BlHK, preferred_element_type=jnp.float32)
    floats_BHj2m = jnp.concatenate((lse_BHj1m, tiling.split_per_head(odo_BlH)[..., None, :]), axis=3)
    q_BHjmK, do_BHjmK, kv_n2BGsK = (
        tiling.split_queries(q_BlHK),
        tiling.split_queries(do_BlHK),
        tiling.split_keys(kv_N2BGlK),
    )
    of_queries = (q_BHjmK, do_BHjmK, ints_BHj3m, floats_BHj2m)
    (dq_BHjmK,) = _call(
        _query_gradient,
        tiling,
        tables,
        grid=q_BHjmK.shape[:3],
        inputs=[*((x, _own) for x in of_queries), (kv_n2BGsK, _anywhere)],
        outputs=[(q_BHjmK, _own)],
        walked=[(tiling.key_size, q_BHjmK.shape[4], kv_n2BGsK.dtype)] * 2,
    )
    n, _, B, G, _, _ = kv_n2BGsK.shape
    (dkv_n2BGKs,) = _call(
        _key_gradients,
        tiling,
        tables_of_keys,
        grid=(B, G, n * tiling.blocks_per_segment),
        inputs=[*((x, _anywhere) for x in of_queries), (kv_n2BGsK, _own_keys)],
        outputs=[(jax.ShapeDtypeStruct(kv_n2BGsK.mT.shape, jnp.float32), _own_keys_last)],
        walked=[(*x.shape[3:], x.dtype) for x in of_queries],
    )
    K = q_BlHK.shape[3]
    return queries.gradient(tiling.join_queries(dq_BHjmK, K)), tiling.join_key_gradients(dkv_n2BGKs, K)


class _Program(NamedTuple):
    """What a program of the grid finds its way by, and the buffers that it walks through."""

    tiling: Tiling
    tables: Tables
    buffers: Any
    first_key: Any  # of this row, for dropout: its natural position


def _outputs(program: _Program, inputs, outputs):
    """The output of one block of queries."""
    (q_ref, ints_ref, kv_ref), (o_ref, lse_ref) = inputs, outputs
    q_mK = q_ref[...]
    K, m = q_mK.shape[1], q_mK.shape[0]
    start_1m, end_1m, stream_1m = (ints_ref[pl.ds(row, 1), :] for row in (START, END, STREAM))

    def one_block_of_keys(t, load, carry):
        o_Km, max_1m, sum_1m = carry
        k_kK, v_kK = load(0), load(1)
        position_k1 = _positions(program, t)
        seen_km = _seen(position_k1, start_1m, jnp.minimum(end_1m, program.tiling.positions_of(t)[1]))
        s_km = _scores(program, q_mK, k_kK, seen_km)
        new_max_1m = jnp.maximum(max_1m, s_km.max(0, keepdims=True))
        shift_1m = jnp.where(new_max_1m == -jnp.inf, 0.0, new_max_1m)  # a query that has seen nothing yet
        p_km = jnp.exp(s_km - shift_1m)
        shrink_1m = jnp.exp(max_1m - shift_1m)
        sum_1m = sum_1m * shrink_1m + p_km.sum(0, keepdims=True)
        met_km = _dropped(program, p_km, stream_1m, position_k1)
        return o_Km * shrink_1m + _dot(v_kK, met_km, (0, 0)), new_max_1m, sum_1m

    nothing = (jnp.zeros((K, m)), jnp.full((1, m), -jnp.inf), jnp.zeros((1, m)))
    o_Km, max_1m, sum_1m = _over_keys(program, kv_ref, one_block_of_keys, nothing)
    seen_1m = sum_1m > 0
    sum_1m = jnp.where(seen_1m, sum_1m, 1.0)
    o_ref[...] = (o_Km / sum_1m).T.astype(o_ref.dtype)
    lse_ref[...] = jnp.where(seen_1m, max_1m, 0.0) + jnp.log(sum_1m)


class _QueryBlock(NamedTuple):
    """One block of queries, with what the backward pass knows of each."""

    q_mK: jax.Array
    do_mK: jax.Array
    start_1m: jax.Array
    end_1m: jax.Array
    stream_1m: jax.Array
    lse_1m: jax.Array
    odo_1m: jax.Array


def _query_gradient(program: _Program, inputs, outputs):
    """The gradient of one block of queries."""
    (q_ref, do_ref, ints_ref, floats_ref, kv_ref), (dq_ref,) = inputs, outputs
    queries = _QueryBlock(
        q_ref[...],
        do_ref[...],
        *(ints_ref[pl.ds(row, 1), :] for row in (START, END, STREAM)),
        *(floats_ref[pl.ds(row, 1), :] for row in (LSE, ODO)),
    )

    def one_block_of_keys(t, load, dq_Km):
        k_kK = load(0)
        _, ds_km = _differentiated(program, queries, (k_kK, load(1)), t)
        return dq_Km + _dot(k_kK, ds_km, (0, 0))

    m, K = queries.q_mK.shape
    dq_Km = _over_keys(program, kv_ref, one_block_of_keys, jnp.zeros((K, m)))
    dq_ref[...] = dq_Km.T.astype(dq_ref.dtype)


def _key_gradients(program: _Program, inputs, outputs):
    """The gradients of one block of keys and values, from all query heads that they serve."""
    (q_ref, do_ref, ints_ref, floats_ref, kv_ref), (dkv_ref,), tables = inputs, outputs, program.tables
    b, g, t = (pl.program_id(axis) for axis in range(3))
    heads, (k_kK, v_kK) = q_ref.shape[1] // pl.num_programs(1), (kv_ref[0], kv_ref[1])
    at = b * pl.num_programs(2) + t
    first, stop = tables.first_B[at], tables.stop_B[at]
    count = stop - first

    def where(turn):
        return b, g * heads + turn // count, first + turn % count

    def one_block_of_queries(_, load, carry):
        dk_kK, dv_kK = carry
        queries = _QueryBlock(
            load(0), load(1), *(load(2, row) for row in (START, END, STREAM)), *(load(3, row) for row in (LSE, ODO))
        )
        p_km, ds_km = _differentiated(program, queries, (k_kK, v_kK), t)
        return dk_kK + _dot(ds_km, queries.q_mK, (1, 0)), dv_kK + _dot(p_km, queries.do_mK, (1, 0))

    nothing = (jnp.zeros(k_kK.shape), jnp.zeros(k_kK.shape))
    sources = [(ref, where) for ref in (q_ref, do_ref, ints_ref, floats_ref)]
    walk = program.tiling.target.walk
    dk_kK, dv_kK = walk(0, heads * count, one_block_of_queries, init=nothing, sources=sources, buffers=program.buffers)
    dkv_ref[0], dkv_ref[1] = dk_kK.T, dv_kK.T


def _differentiated(program: _Program, queries: _QueryBlock, block_of_keys, t):
    """The weights that values were met with, and the gradient of the products of queries and keys: `p_km, ds_km`."""
    k_kK, v_kK = block_of_keys
    position_k1 = _positions(program, t)
    seen_km = _seen(position_k1, queries.start_1m, jnp.minimum(queries.end_1m, program.tiling.positions_of(t)[1]))
    p_km = jnp.exp(_scores(program, queries.q_mK, k_kK, seen_km) - queries.lse_1m)
    dp_km = _dot(v_kK, queries.do_mK, (1, 1))
    met_km, dp_km = (_dropped(program, x, queries.stream_1m, position_k1) for x in (p_km, dp_km))
    return met_km, p_km * (dp_km - queries.odo_1m) * program.tiling.scale


def _dropped(program: _Program, x_km, stream_1m, position_k1):
    if not program.tiling.drops:
        return x_km
    return dropped(x_km, stream_1m.astype(jnp.uint32), program.first_key + position_k1, program.tables.rate_1[0])


def _positions(program: _Program, t):
    return program.tiling.positions_of(t)[0] + jax.lax.broadcasted_iota(jnp.int32, (program.tiling.key_size, 1), 0)


def _seen(position_k1, start_1m, end_1m):
    return (start_1m <= position_k1) & (position_k1 < end_1m)


def _scores(program: _Program, q_mK, k_kK, seen_km):
    """`s_km`, minus infinity where the query does not see the key."""
    return jnp.where(seen_km, _dot(k_kK, q_mK, (1, 1)) * program.tiling.scale, -jnp.inf)


def _dot(a, b, contracted: tuple[int, int]):
    """In the dtype of the inputs, the narrower one, with float32 sums; float32 is not rounded to less."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    axes = (contracted[:1], contracted[1:])
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), (axes, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _over_keys(program: _Program, kv_ref, body, init):
    """`body(t, load, carry)` over the blocks of keys that this program's queries touch, in natural order."""
    tiling, tables, buffers, _ = program
    b, head, j = (pl.program_id(axis) for axis in range(3))
    g = head // (pl.num_programs(1) // kv_ref.shape[3])
    at = b * pl.num_programs(2) + j

    def part(pair):
        def where(turn):
            t = tiling.block_of(turn)
            offset = pl.multiple_of(t % tiling.blocks_per_segment * tiling.key_size, tiling.key_size)
            return t // tiling.blocks_per_segment, pair, b, g, pl.ds(offset, tiling.key_size)

        return where

    def in_turn(turn, load, carry):
        return body(tiling.block_of(turn), load, carry)

    sources = [(kv_ref, part(0)), (kv_ref, part(1))]
    return tiling.target.walk(
        tables.first_B[at], tables.stop_B[at], in_turn, init=init, sources=sources, buffers=buffers
    )


def _own(tiling: Tiling, x: Any) -> pl.BlockSpec:
    """The block of an array `[B, H, j, ...]` that is the program's own."""
    return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, h, j: (b, h, j, 0, 0))


def _own_keys(tiling: Tiling, x: Any) -> pl.BlockSpec:
    """The program's own block of keys and values `[n, 2, B, G, s, K]`."""

    def index(b, g, t):
        return t // tiling.blocks_per_segment, 0, b, g, t % tiling.blocks_per_segment, 0

    return pl.BlockSpec((None, 2, None, None, tiling.key_size, x.shape[5]), index)


def _own_keys_last(tiling: Tiling, x: Any) -> pl.BlockSpec:
    """A block of the gradients of keys and values, `[n, 2, B, G, K, s]`: that of this program."""

    def index(b, g, t):
        return t // tiling.blocks_per_segment, 0, b, g, 0, t % tiling.blocks_per_segment

    return pl.BlockSpec((None, 2, None, None, x.shape[4], tiling.key_size), index)


def _anywhere(tiling: Tiling, x: Any) -> pl.BlockSpec:
    """The whole array, where it is: the program reads parts of it."""
    return pl.BlockSpec(memory_space=pl.ANY)


def _call(kernel, tiling: Tiling, tables: Tables, *, grid, inputs, outputs, walked) -> Any:
    """Runs `kernel(program, input_refs, output_refs)` for every program of the grid.

    Inputs and outputs are pairs of an array (or its shape) and what a program sees of it; `walked` are the blocks that
    it meets one after the other, as rows, columns and dtype.
    """
    varies = jax.typeof(sum(jnp.zeros_like(x, jnp.int32, shape=()) for x in (*tables, *(x for x, _ in inputs))))

    def program(*refs):
        refs, of_tables = refs[len(tables) :], refs[: len(tables)]
        refs, of_inputs = refs[len(inputs) :], refs[: len(inputs)]
        of_outputs, buffers = refs[: len(outputs)], refs[len(outputs) :]
        found = Tables(*of_tables)
        first_key = found.key_B[pl.program_id(0)] if tiling.drops else 0
        kernel(_Program(tiling, found, buffers, first_key), of_inputs, of_outputs)

    return pl.pallas_call(
        program,
        grid=tuple(grid),
        in_specs=[tiling.target.tables] * len(tables) + [seen(tiling, x) for x, seen in inputs],
        out_specs=[seen(tiling, x) for x, seen in outputs],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varies.manual_axis_type) for x, _ in outputs
        ],
        scratch_shapes=tiling.target.buffers(walked),
        compiler_params=tiling.target.compiler,
        interpret=tiling.interpret,
    )(*tables, *(x for x, _ in inputs))
