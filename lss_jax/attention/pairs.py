"""Arrays over pairs of a query and a key: a mask that is no interval, and a bias of the scores.

They are of others' models (ours have intervals): sharded by the rows of the queries, whole along the keys, which are in
natural order, and read where scores are computed, block by block. An axis of size 1 holds for all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.attention.setting import Setting

QUERY_AXIS = 2


class Pairs(NamedTuple):
    """Arrays of local queries and all keys."""

    seen_BHlL: jax.Array | None  # booleans: whether a query sees a key, besides its interval
    bias_BHlL: jax.Array | None  # added to the scaled scores

    def of_group(self, number: Any, heads: int) -> "Pairs":
        """Those of one of equal groups of heads."""
        return jax.tree.map(lambda x: _of_heads(x, number, heads), self)


def applied(pairs: Pairs | None, s_BGmL: jax.Array, queries: int) -> jax.Array:
    """Scores with the bias, minus infinity where a query does not see the key; `m` are `R` heads of so many queries."""
    if pairs is None:
        return s_BGmL
    B, G, m, L = s_BGmL.shape
    s_BGRlL = s_BGmL.reshape(B, G, m // queries, queries, L)
    if pairs.bias_BHlL is not None:
        s_BGRlL = s_BGRlL + _by_kv_head(pairs.bias_BHlL, G).astype(s_BGmL.dtype)
    if pairs.seen_BHlL is not None:
        s_BGRlL = jnp.where(_by_kv_head(pairs.seen_BHlL, G), s_BGRlL, -jnp.inf)
    return s_BGRlL.reshape(s_BGmL.shape)


def bias_gradient(bias_BHlL: jax.Array, ds_BGmL: jax.Array, queries: int) -> jax.Array:
    """That of the bias, in the dtype of the scores' own: summed where one number is for several scores."""
    B, G, m, L = ds_BGmL.shape
    ds_BGRlL = ds_BGmL.reshape(B, G, m // queries, queries, L)
    shared = [axis for axis, size in enumerate(_by_kv_head(bias_BHlL, G).shape) if size == 1]
    return ds_BGRlL.sum(shared, keepdims=True).reshape(bias_BHlL.shape)


def block_of(x_BHlL: jax.Array, at: Sequence[Any], sizes: Sequence[int]) -> jax.Array:
    """The part of an array that starts `at` (row, head, query, key), of these sizes where it is not 1."""
    return jax.lax.dynamic_slice(x_BHlL, *_bounds(x_BHlL, at, sizes))


def add_block(x_BHlL: jax.Array, block: jax.Array, at: Sequence[Any]) -> jax.Array:
    """The array with a block added that `block_of` would read there."""
    start, _ = _bounds(x_BHlL, at, block.shape)
    before = jax.lax.dynamic_slice(x_BHlL, start, block.shape)
    return jax.lax.dynamic_update_slice(x_BHlL, before + block, start)


def of_whole_sequence(pairs: Pairs, setting: Setting, queries: int) -> Pairs:
    """Those of all queries in natural order and of this device's heads, from those of a segment of so many queries."""
    if setting.axis is None:
        return pairs
    return jax.tree.map(lambda x: _exchanged(x, setting, queries), pairs)


def _exchanged(x_BHlL: jax.Array, setting: Setting, queries: int) -> jax.Array:
    axis, N, heads = setting.axis, setting.layout.devices, x_BHlL.shape[1]
    if x_BHlL.shape[QUERY_AXIS] != queries:  # one row for all queries: it is everywhere
        return _of_heads(x_BHlL, jax.lax.axis_index(axis), heads // N)
    if heads == 1:
        x_NBhlL = jax.lax.all_gather(x_BHlL, axis)
    else:
        x_NBhlL = jnp.stack(jnp.split(x_BHlL, N, 1))
        x_NBhlL = jax.lax.all_to_all(x_NBhlL, axis, split_axis=0, concat_axis=0, tiled=True)
    return setting.layout.natural(x_NBhlL, QUERY_AXIS + 1)


def _of_heads(x_BHlL: jax.Array, number: Any, heads: int) -> jax.Array:
    if x_BHlL.shape[1] == 1:
        return x_BHlL
    return jax.lax.dynamic_slice_in_dim(x_BHlL, number * heads, heads, 1)


def _by_kv_head(x_BHlL: jax.Array, kv_heads: int) -> jax.Array:
    """`x_BGRlL`, whose heads are `R` query heads of each of `G` key/value heads."""
    B, H, l, L = x_BHlL.shape
    return x_BHlL.reshape((B, 1, 1, l, L) if H == 1 else (B, kv_heads, H // kv_heads, l, L))


def _bounds(x_BHlL: jax.Array, at: Sequence[Any], sizes: Sequence[int]) -> tuple[list[Any], list[int]]:
    start = [0 if whole == 1 else first for whole, first in zip(x_BHlL.shape, at, strict=True)]
    return start, [min(size, whole) for whole, size in zip(x_BHlL.shape, sizes, strict=True)]
