"""Queries and keys in padded blocks for the fused kernels, and the tables by which their programs find their way.

Compilers for GPUs and TPUs want blocks of powers of two: runs of tokens are padded to whole blocks, and narrow heads
with zeros. The letters are those of `blocks`; `j` counts the blocks of a head's queries, each of `m`, and `t` those of
the keys, each of `k`, in the order in which they are stored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.attention.kernels.blocks import QueryBlocking, too_short
from lss_jax.attention.kernels.interface import Queries
from lss_jax.attention.kernels.targets import SMALLEST, Target
from lss_jax.attention.setting import Setting
from lss_jax.parallel.layout import Layout

START, END, STREAM = range(3)  # rows of `ints_BHj3m`


class Tiling(NamedTuple):
    """What is known of a call at compile time: above all, the blocks of queries and of keys."""

    queries: QueryBlocking  # each block of one head
    layout: Layout  # of the keys in the blocks
    unordered: Layout | None  # of the keys as they come, if its runs are too short for blocks
    run: int  # keys without padding
    key_size: int  # k
    scale: float
    drops: bool
    target: Target
    interpret: bool

    @property
    def padded_run(self) -> int:
        """Keys in the blocks of a run."""
        return -(-self.run // self.key_size) * self.key_size

    @property
    def blocks_per_segment(self) -> int:
        """Blocks of keys in one segment."""
        return self.layout.chunks_per_device * self.blocks_per_run

    @property
    def blocks_per_run(self) -> int:
        """Blocks of keys in a run of consecutive ones."""
        return self.padded_run // self.key_size

    def block_of(self, turn: Any) -> Any:
        """The block, as stored, that is number `turn` in natural order."""
        segment, nth = self.layout.place_of(turn // self.blocks_per_run)
        return segment * self.blocks_per_segment + nth * self.blocks_per_run + turn % self.blocks_per_run

    def positions_of(self, t: Any) -> tuple[Any, Any]:
        """The natural positions of block `t`: from the first to before the second, which leaves out the padding."""
        segment, block = t // self.blocks_per_segment, t % self.blocks_per_segment
        start = self.layout.chunk_at(segment, block // self.blocks_per_run) * self.run
        offset = block % self.blocks_per_run * self.key_size
        return start + offset, start + jnp.minimum(offset + self.key_size, self.run)

    def split_queries(self, x_BlHK: jax.Array) -> jax.Array:
        """`x_BHjmK`, `K` widened to a power of two."""
        B, _, H, _ = x_BlHK.shape
        x_i1mK = self.queries.split(_widened(x_BlHK))
        return x_i1mK.reshape(B, H, -1, *x_i1mK.shape[2:])

    def join_queries(self, x_BHjmK: jax.Array, K: int) -> jax.Array:
        """The inverse: `x_BlHK`."""
        return self.queries.join(x_BHjmK.reshape(-1, 1, *x_BHjmK.shape[3:]))[..., :K]

    def split_per_query(self, x: jax.Array) -> jax.Array:
        """A number per query, `[l]` or `[B, l]`, as `x_BHjm`."""
        return self.queries.split_per_query(x).reshape(self.queries.batch, self.queries.kv_heads, -1, self.queries.size)

    def split_per_head(self, x_BlH: jax.Array) -> jax.Array:
        """A number per query and head, as `x_BHjm`."""
        B, _, H = x_BlH.shape
        return self.queries.split_per_head(x_BlH).reshape(B, H, -1, self.queries.size)

    def join_per_head(self, x_BHj1m: jax.Array) -> jax.Array:
        """The inverse, with one row per block: `x_BlH`."""
        return self.queries.join(x_BHj1m.reshape(-1, 1, self.queries.size, 1))[..., 0]

    def split_keys(self, kv_N2BGlK: jax.Array) -> jax.Array:
        """`kv_n2BGsK`, all runs padded to whole blocks, `K` widened."""
        if self.unordered:
            kv_N2BGlK = self.unordered.natural(kv_N2BGlK, 4)[None]
        kv = _widened(kv_N2BGlK)
        runs = kv.reshape(*kv.shape[:4], -1, self.run, kv.shape[5])
        padded = jnp.pad(runs, [(0, 0)] * 5 + [(0, self.padded_run - self.run), (0, 0)])
        return padded.reshape(*kv.shape[:4], -1, kv.shape[5])

    def join_key_gradients(self, dkv_n2BGKs: jax.Array, K: int) -> jax.Array:
        """The inverse, keys last: `dkv_N2BGKl`."""
        runs = dkv_n2BGKs.reshape(*dkv_n2BGKs.shape[:5], -1, self.padded_run)[..., :K, :, : self.run]
        dkv_n2BGKs = runs.reshape(*runs.shape[:5], -1)
        return self.unordered.segments(dkv_n2BGKs[0], 4) if self.unordered else dkv_n2BGKs


class Tables(NamedTuple):
    """What programs find their way by, one-dimensional: a range for each of their blocks, row after row of the batch.

    For blocks of queries it is that of the blocks of keys that they touch, counted in natural order; for blocks of keys
    that of the blocks of queries from the first to the last that touches them.
    """

    first_B: Any
    stop_B: Any
    rate_1: Any  # of dropout
    key_B: Any  # for dropout: the natural position of a row's first key


def tiling_of(queries: Queries, kv_N2BGlK: Any, setting: Setting, target: Target) -> Tiling:
    """The blocks for queries and keys of these shapes and dtype: bounded by the config, and by the target's room."""
    B, l, H, K = queries.q_BlHK.shape
    key_layout = setting.key_layout
    least = SMALLEST if setting.interpret else target.least
    room = target.most_bytes // (_width(K) * queries.q_BlHK.dtype.itemsize)
    most_queries = min(setting.block_queries, target.most_queries, room)
    most_keys = min(setting.block_keys, target.most_keys, room)
    runs = setting.layout.chunks_per_device
    runs = 1 if too_short(l // runs, most_queries) else runs
    size = _block_size(l // runs, most_queries, least)
    unordered, run = None, kv_N2BGlK.shape[4] // key_layout.chunks_per_device
    if key_layout.devices > 1 and too_short(run, most_keys):
        unordered, key_layout, run = key_layout, setting.unsharded.key_layout, run * len(key_layout.chunks_NC.ravel())
    return Tiling(
        queries=QueryBlocking(batch=B, runs=runs, run_length=l // runs, size=size, kv_heads=H, block_heads=1),
        layout=key_layout,
        unordered=unordered,
        run=run,
        key_size=_block_size(run, most_keys, least),
        scale=setting.scale_of(K),
        drops=queries.dropout is not None,
        target=target,
        interpret=setting.interpret,
    )


def _block_size(run: int, most: int, least: int) -> int:
    """The largest power of two up to `most`, and no larger than it takes to hold the run."""
    return max(least, min(1 << (most.bit_length() - 1), 1 << (run - 1).bit_length()))


def _widened(x: jax.Array) -> jax.Array:
    """Heads, the last axis, as wide as a power of two: zeros change no product."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, _width(x.shape[-1]) - x.shape[-1])])


def _width(K: int) -> int:
    return max(SMALLEST, 1 << (K - 1).bit_length())


def facts(tiling: Tiling, queries: Queries) -> tuple[Tables, Tables, jax.Array]:
    """The tables of blocks of queries and of keys, and the queries' rows `START`, `END` and `STREAM`: `ints_BHj3m`."""
    _, mask, dropout, pairs = queries
    assert pairs is None  # which are refused before: `placement.kernel_on`
    blocks_t = jnp.arange(tiling.layout.devices * tiling.blocks_per_segment)
    order_t = tiling.block_of(blocks_t)
    begin_11t, end_11t = (bound_t[None, None] for bound_t in tiling.positions_of(blocks_t))
    start_BHjm, end_BHjm = tiling.split_per_query(mask.start), tiling.split_per_query(mask.end)
    sees_Bjm = (start_BHjm < end_BHjm)[:, 0]
    start_Bj1 = jnp.min(start_BHjm[:, 0], -1, where=sees_Bjm, initial=jnp.iinfo(jnp.int32).max, keepdims=True)
    end_Bj1 = jnp.max(end_BHjm[:, 0], -1, where=sees_Bjm, initial=0, keepdims=True)
    touches_Bjt = (start_Bj1 < end_11t) & (begin_11t < end_Bj1)
    first_Bj, stop_Bj = range_of(touches_Bjt[..., order_t])
    first_Bt, stop_Bt = range_of(touches_Bjt.swapaxes(1, 2))
    rate_1 = jnp.full(1, dropout.rate if dropout else 0.0, jnp.float32)
    key_B = jnp.zeros(tiling.queries.batch, jnp.int32)
    key_B = key_B if dropout is None or dropout.first_B is None else dropout.first_B
    of_queries = Tables(first_Bj.ravel(), stop_Bj.ravel(), rate_1, key_B)
    of_keys = Tables(first_Bt.ravel(), stop_Bt.ravel(), rate_1, key_B)
    stream_BHjm = jnp.zeros_like(start_BHjm) if dropout is None else tiling.split_per_head(dropout.stream_BlH)
    return of_queries, of_keys, jnp.stack((start_BHjm, end_BHjm, stream_BHjm.astype(jnp.int32)), axis=3)


def range_of(touches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The shortest range along the last axis with all that is true in it; int32."""
    first, from_end = (jnp.argmax(x, -1).astype(jnp.int32) for x in (touches, jnp.flip(touches, -1)))
    return first, jnp.where(touches.any(-1), touches.shape[-1] - from_end, first)
