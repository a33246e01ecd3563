"""The key/value cache of generation, sharded over `seq`: keys and values stay on the device that computed them.

They are never gathered. For a new token each device takes the softmax over its own slots, and the devices' outputs are
combined by their log-sum-exp (as those of the splits of Flash-Decoding, Dao et al. 2023). This is one collective per
layer, of `K + 1` numbers per head and device. An encoder-decoder attends in the same way, by one more collective per
layer, to the keys and values that its decoder makes of the source, which stay where their segments were encoded.

A slot stores the natural position of its token, so the prompt may have any layout and rows may differ in length.
Letters beside the usual: `n` layers, `c` slots (global outside `shard_map`, local inside), `D` sources, each with one
row or several.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lss_jax.attention.mask import Intervals
from lss_jax.parallel.mesh import DATA, MODEL, SEQ

EMPTY = -1  # the position of an empty slot, which every mask masks out


class Cache(NamedTuple):
    """The arrays of a cache; or, in the same fields, their specs or shardings."""

    kv_n2BGcK: Any
    position_Bc: Any  # natural, of the token in each slot
    source: Any  # a cache of the sources, which no step changes; None: there are none


CACHE_SPECS = Cache(P(None, None, DATA, MODEL, SEQ), P(DATA, SEQ), None)
SPECS_WITH_SOURCE = CACHE_SPECS._replace(source=CACHE_SPECS)


def fill(kv_n2BGlK: jax.Array, positions_l: jax.Array, count_B: jax.Array, more: int) -> Cache:
    """The local cache after a prompt: its first `count_B` tokens of each row, then `more` empty slots."""
    position_Bl = jnp.where(positions_l < count_B[:, None], positions_l, EMPTY)
    return Cache(
        jnp.pad(kv_n2BGlK, [(0, 0)] * 4 + [(0, more), (0, 0)]),
        jnp.pad(position_Bl, ((0, 0), (0, more)), constant_values=EMPTY),
        source=None,
    )


def empty(source: Cache, slots: int, rows: int) -> Cache:
    """The local cache before the first token: for each source so many rows of `slots` slots."""
    n, _, D, G, _, K = source.kv_n2BGcK.shape
    return Cache(
        jnp.zeros_like(source.kv_n2BGcK, shape=(n, 2, D * rows, G, slots, K)),
        jnp.zeros_like(source.position_Bc, shape=(D * rows, slots)) + EMPTY,
        source,
    )


def write(cache: Cache, kv_n2BGK: jax.Array, position_B: jax.Array, slot: jax.Array, mine: jax.Array | bool) -> Cache:
    """Writes one token per row into a local slot if it is `mine`; in place where the cache is donated."""

    def put(array: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        before = jax.lax.dynamic_slice_in_dim(array, slot, 1, axis)
        after = jnp.where(mine, jnp.expand_dims(new, axis), before)
        return jax.lax.dynamic_update_slice_in_dim(array, after, slot, axis)

    return Cache(put(cache.kv_n2BGcK, kv_n2BGK, 4), put(cache.position_Bc, position_B, 1), cache.source)


def reordered(cache: Cache, row_B: jax.Array) -> Cache:
    """The local cache with other rows, by their local numbers; no slot leaves its device."""
    return Cache(cache.kv_n2BGcK[:, :, row_B], cache.position_Bc[row_B], cache.source)


def attend_to_cache(
    q_BHK: jax.Array,
    own_2BGK: jax.Array,
    past_2BGcK: jax.Array,
    position_Bc: jax.Array,
    mask: Intervals,
    axis: str | None,
) -> jax.Array:
    """Attention of one new token per row, `o_BHK`, to itself and to what the mask (`[B]`) shows of the cache.

    `axis` is the mesh axis over which the slots are sharded, None if they are not. Softmax and sums are float32.
    """
    B, H, K = q_BHK.shape
    q_BGRK = q_BHK.reshape(B, own_2BGK.shape[2], -1, K)
    seen_Bc = (mask.start[:, None] <= position_Bc) & (position_Bc < mask.end[:, None])
    local_BGRk = _partial_attention(q_BGRK, past_2BGcK, seen_Bc)
    # the token itself is on every device, so that it is counted once, after the gather
    own_BGRk = _partial_attention(q_BGRK, own_2BGK[:, :, :, None], jnp.ones((B, 1), bool))
    o_BGRK = _combined(jnp.concatenate((_gathered(local_BGRk, axis), own_BGRk[None])))
    return o_BGRK.reshape(B, H, K).astype(q_BHK.dtype)


def attend_to_source(q_BHK: jax.Array, kv_2DGcK: jax.Array, position_Dc: jax.Array, axis: str | None) -> jax.Array:
    """Attention of one new token per row, `o_BHK`, to all of its source; equally many neighbouring rows share one.

    They do so as further queries of the same keys, so that a source is cached once.
    """
    (B, H, K), (D, G) = q_BHK.shape, kv_2DGcK.shape[1:3]
    q_DGRK = q_BHK.reshape(D, B // D, G, H // G, K).swapaxes(1, 2).reshape(D, G, -1, K)
    local_DGRk = _partial_attention(q_DGRK, kv_2DGcK, position_Dc != EMPTY)
    o_DGRK = _combined(_gathered(local_DGRk, axis))
    o_BGRK = o_DGRK.reshape(D, G, B // D, H // G, K).swapaxes(1, 2)
    return o_BGRK.reshape(B, H, K).astype(q_BHK.dtype)


def _combined(parts_NBGRk: jax.Array) -> jax.Array:
    """Attention's output, `[B, G, R, K]`, from parts that each have its log-sum-exp behind them."""
    weight_NBGR = jax.nn.softmax(parts_NBGRk[..., -1], axis=0)
    return jnp.einsum("NBGR,NBGRK->BGRK", weight_NBGR, parts_NBGRk[..., :-1])


def _gathered(part_BGRk: jax.Array, axis: str | None) -> jax.Array:
    """All devices' outputs, on every device: the result does not vary over `axis`."""
    return part_BGRk[None] if axis is None else jax.lax.all_gather(part_BGRk, axis, to="invarying")


def _partial_attention(q_BGRK: jax.Array, kv_2BGcK: jax.Array, seen_Bc: jax.Array) -> jax.Array:
    """Attention's output over some keys followed by its log-sum-exp: `[B, G, R, K + 1]`, float32.

    Where all keys are masked out, the output is zero and the log-sum-exp minus infinity.
    """
    k_BGcK, v_BGcK = kv_2BGcK
    s_BGRc = jnp.einsum("BGRK,BGcK->BGRc", q_BGRK, k_BGcK, preferred_element_type=jnp.float32) * q_BGRK.shape[3] ** -0.5
    s_BGRc = jnp.where(seen_Bc[:, None, None], s_BGRc, -jnp.inf)
    max_BGR1 = jnp.maximum(s_BGRc.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    e_BGRc = jnp.exp(s_BGRc - max_BGR1)
    sum_BGR1 = e_BGRc.sum(-1, keepdims=True)
    o_BGRK = jnp.einsum("BGRc,BGcK->BGRK", e_BGRc.astype(v_BGcK.dtype), v_BGcK, preferred_element_type=jnp.float32)
    o_BGRK = o_BGRK / jnp.where(sum_BGR1 > 0, sum_BGR1, 1.0)
    return jnp.concatenate((o_BGRK, max_BGR1 + jnp.log(sum_BGR1)), axis=-1)
