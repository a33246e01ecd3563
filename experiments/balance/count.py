"""Counts the blocks that the blockwise kernel computes, with the functions by which the kernel itself finds them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lss_jax.attention.kernels.blocks import chunks_of_all, key_blocks, query_blocking, too_short, visits
from lss_jax.attention.mask import Intervals, bidirectional
from lss_jax.parallel.layout import Layout


def computed_blocks(
    mask: Callable[[jax.Array], Intervals], layout: Layout, length: int, block_queries: int, block_keys: int
) -> np.ndarray:
    """The number of blocks that the kernel computes on each device, `[N]`; `mask` takes natural positions."""
    l = length // layout.devices
    assert not too_short(l // layout.chunks_per_device, block_keys), "the kernel merges such short runs"
    keys = key_blocks(chunks_of_all(layout, l), block_keys)
    counts = []
    for position_l in jnp.asarray(layout.positions(length)).reshape(layout.devices, l):
        intervals = mask(position_l)
        rows = intervals.start.shape[0] if intervals.start.ndim == 2 else 1
        queries = query_blocking((rows, l, 1, 1), layout, (block_queries, block_keys), keys.size)
        counts.append(visits(keys, queries, intervals.start, intervals.end))
    return np.array(counts)


def all_blocks(layout: Layout, length: int, block_queries: int, block_keys: int) -> int:
    """The number of blocks without a mask, summed over devices."""
    return int(computed_blocks(partial(bidirectional, length=length), layout, length, block_queries, block_keys).sum())
