"""Blocks of queries and of keys: how they are made, where they lie, and which of them an interval touches.

Letters beside the usual: `n` segments of `s` keys; `c` runs of consecutive keys; `t` blocks of `k` keys; `i` blocks of
queries, each of one row of the batch, `g` key/value heads and `q` neighbours, that is `m = R q` queries of each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.attention.mask import Intervals, lifted
from lss_jax.attention.setting import Setting
from lss_jax.parallel.layout import Layout

SMALLEST_BLOCK = 128  # runs shorter than this are not worth blocks of their own, unless blocks are to be smaller still


class KeyChunks(NamedTuple):
    """Runs of `length` consecutive keys, in the order of their positions.

    Run `c` starts at natural position `start_c[c]`; it lies in segment `segment_c[c]`, from key `offset_c[c]` on.
    """

    start_c: Any
    segment_c: Any
    offset_c: Any
    length: int


class KeyBlocks(NamedTuple):
    """The key blocks in natural order, all of `size` keys, read from `offset_t` on in segment `segment_t`.

    Block `t` answers for the keys at positions `begin_t` to `end_t` (exclusive). The last block of a run reaches back,
    so as to be as long as the others: the first key that it reads is at position `first_t`, at or before `begin_t`.
    """

    begin_t: jax.Array
    end_t: jax.Array
    first_t: jax.Array
    segment_t: jax.Array
    offset_t: jax.Array
    size: int


def chunks_of_all(layout: Layout, segment_length: int) -> KeyChunks:
    """The keys of the whole sequence, the devices' segments stacked in their order."""
    length = segment_length // layout.chunks_per_device
    order_c = layout.chunks_NC.ravel().argsort()
    segment_c, nth_c = order_c // layout.chunks_per_device, order_c % layout.chunks_per_device
    return KeyChunks(jnp.arange(len(order_c)) * length, segment_c, nth_c * length, length)


def chunks_of_device(layout: Layout, segment_length: int, device: jax.Array) -> KeyChunks:
    """The keys of one device's segment."""
    count = layout.chunks_per_device
    length = segment_length // count
    nth_c = jnp.arange(count)
    return KeyChunks(jnp.asarray(layout.chunks_NC)[device] * length, 0 * nth_c, nth_c * length, length)


def key_blocks(chunks: KeyChunks, target: int) -> KeyBlocks:
    """Equal blocks of each run, with up to `target` keys."""
    blocks, size = even(chunks.length, target)
    in_run_t = jnp.arange(blocks) * size
    read_t = jnp.minimum(in_run_t, chunks.length - size)

    def of_all_runs(first_c: Any, in_run_t: jax.Array) -> jax.Array:
        return (jnp.asarray(first_c, jnp.int32)[:, None] + in_run_t[None]).ravel()

    return KeyBlocks(
        begin_t=of_all_runs(chunks.start_c, in_run_t),
        end_t=of_all_runs(chunks.start_c, jnp.minimum(in_run_t + size, chunks.length)),
        first_t=of_all_runs(chunks.start_c, read_t),
        segment_t=of_all_runs(chunks.segment_c, 0 * in_run_t),
        offset_t=of_all_runs(chunks.offset_c, read_t),
        size=size,
    )


def even(length: int, target: int) -> tuple[int, int]:
    """The number and the size of equal blocks, up to `target` long, that cover `length`."""
    blocks = -(-length // target)
    return blocks, -(-length // blocks)


def too_short(run: int, target: int) -> bool:
    """Whether runs of this length should share blocks of up to `target`."""
    return run < min(SMALLEST_BLOCK, target)


def touched(keys: KeyBlocks, start_q: jax.Array, end_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The range (first, stop) of key blocks of which any of these queries sees anything; `[..., q]` to `[...]`."""
    sees = start_q < end_q
    start = jnp.min(start_q, -1, where=sees, initial=jnp.iinfo(jnp.int32).max)
    end = jnp.max(end_q, -1, where=sees, initial=0)
    begin_t, end_t = (lifted(bound_t, start_q.ndim) for bound_t in (keys.begin_t, keys.end_t))
    first = jnp.sum(end_t <= start[..., None], -1)
    stop = jnp.sum(begin_t < end[..., None], -1)
    return first, jnp.maximum(first, stop)


def visits(keys: KeyBlocks, blocking: "QueryBlocking", start: jax.Array, end: jax.Array) -> int:
    """How many pairs of a block of queries and a block of keys a kernel computes; intervals `[l]` or `[B, l]`."""
    first_i, stop_i = touched(keys, blocking.split_per_query(start), blocking.split_per_query(end))
    return int((stop_i - first_i).sum())


def scores(keys: KeyBlocks, shape_BlHG: tuple[int, int, int, int], setting: Setting, mask: Intervals) -> int:
    """How many scores the blockwise kernel computes for local queries of this shape, which see what `mask` shows."""
    (_, _, H, kv_heads), largest = shape_BlHG, (setting.block_queries, setting.block_keys)
    blocking = query_blocking(shape_BlHG, setting.layout, largest, keys.size)
    of_blocks = blocking.block_heads * (H // kv_heads) * blocking.size * keys.size
    return visits(keys, blocking, mask.start, mask.end) * of_blocks


class QueryBlocking(NamedTuple):
    """Local queries `[B, l, H, K]` in equal blocks, of which none reaches over the end of one of the `runs`."""

    batch: int
    runs: int
    run_length: int
    size: int  # q
    kv_heads: int
    block_heads: int  # g

    def split(self, x_BlHK: jax.Array) -> jax.Array:
        """`x_igmK`; the padding is zero."""
        H, K = x_BlHK.shape[2:]
        g, R = self.block_heads, H // self.kv_heads
        x = self.padded(x_BlHK, 1).reshape(self.batch, -1, self.size, self.kv_heads // g, g, R, K)
        return x.transpose(0, 3, 1, 4, 5, 2, 6).reshape(-1, g, R * self.size, K)

    def join(self, x_igmK: jax.Array) -> jax.Array:
        """The inverse of `split`: `x_BlHK`."""
        _, g, m, K = x_igmK.shape
        x = x_igmK.reshape(self.batch, self.kv_heads // g, -1, g, m // self.size, self.size, K)
        x = x.transpose(0, 2, 5, 1, 3, 4, 6).reshape(self.batch, self.runs, -1, self.kv_heads * m // self.size, K)
        return x[:, :, : self.run_length].reshape(self.batch, -1, *x.shape[3:])

    def split_per_head(self, x_BlH: jax.Array) -> jax.Array:
        """The same for a number per query and head: `x_igm`."""
        return self.split(x_BlH[..., None])[..., 0]

    def split_per_query(self, x: jax.Array) -> jax.Array:
        """The same for a number per query, `[l]` or `[B, l]`: `x_iq`."""
        x_1iq = self.padded(x, x.ndim - 1).reshape(-1, 1, self.runs * self._blocks, self.size)
        return jnp.broadcast_to(x_1iq, (self.batch, self.kv_heads // self.block_heads, *x_1iq.shape[2:])).reshape(
            -1, self.size
        )

    def batch_rows_and_heads(self) -> tuple[jax.Array, jax.Array]:
        """The batch row and the first key/value head of each block: `row_i, head_i`."""
        head_groups = self.kv_heads // self.block_heads
        index_i = jnp.arange(self.batch * head_groups * self.runs * self._blocks) // (self.runs * self._blocks)
        return index_i // head_groups, index_i % head_groups * self.block_heads

    def first_queries(self) -> jax.Array:
        """The first query of each block, counted in the padded order: `query_i`."""
        of_head = self.runs * self._blocks
        return jnp.arange(self.batch * (self.kv_heads // self.block_heads) * of_head) % of_head * self.size

    @property
    def _blocks(self) -> int:
        return -(-self.run_length // self.size)

    def padded(self, x: jax.Array, axis: int) -> jax.Array:
        """An array with the queries at `axis`, each run padded to whole blocks."""
        missing = -self.run_length % self.size
        if not missing:
            return x
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        widths = [(0, 0)] * (axis + 1) + [(0, missing)] + [(0, 0)] * len(after)
        return jnp.pad(x.reshape(*before, self.runs, -1, *after), widths).reshape(*before, -1, *after)

    def cropped(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `padded`."""
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        runs = x.reshape(*before, self.runs, -1, *after)
        return jax.lax.slice_in_dim(runs, 0, self.run_length, axis=axis + 1).reshape(*before, -1, *after)


def query_blocking(
    shape_BlHG: tuple[int, int, int, int], layout: Layout, largest: tuple[int, int], key_block: int
) -> QueryBlocking:
    """Equal blocks of local queries, no larger than the `largest` (queries, keys), to meet blocks of `key_block` keys.

    Where both are smaller than they may be, a block has as many key/value heads as give it the scores that one head
    would have in the largest blocks.
    """
    B, l, H, kv_heads = shape_BlHG
    block_queries, block_keys = largest
    runs = 1 if too_short(l // layout.chunks_per_device, block_queries) else layout.chunks_per_device
    size = even(l // runs, block_queries)[1]
    room = block_queries * block_keys // (size * key_block * (H // kv_heads))
    heads = max(heads for heads in range(1, kv_heads + 1) if kv_heads % heads == 0 and heads <= max(room, 1))
    return QueryBlocking(batch=B, runs=runs, run_length=l // runs, size=size, kv_heads=kv_heads, block_heads=heads)
