"""The key/value cache of generation, sharded over `seq`: keys and values stay on the device that computed them.

They are never gathered. For a new token each device takes the softmax over its own slots, and the devices' outputs are
combined by their log-sum-exp (as those of the splits of Flash-Decoding, Dao et al. 2023). This is one collective per
layer, of `K + 1` numbers per head and device.

A slot stores the natural position of its token, so the prompt may have any layout and rows may differ in length.
Letters beside the usual: `n` layers, `c` slots (global outside `shard_map`, local inside).
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


CACHE_SPECS = Cache(P(None, None, DATA, MODEL, SEQ), P(DATA, SEQ))


def fill(kv_n2BGlK: jax.Array, positions_l: jax.Array, count_B: jax.Array, more: int) -> Cache:
    """The local cache after a prompt: its first `count_B` tokens of each row, then `more` empty slots."""
    position_Bl = jnp.where(positions_l < count_B[:, None], positions_l, EMPTY)
    return Cache(
        jnp.pad(kv_n2BGlK, [(0, 0)] * 4 + [(0, more), (0, 0)]),
        jnp.pad(position_Bl, ((0, 0), (0, more)), constant_values=EMPTY),
    )


def write(cache: Cache, kv_n2BGK: jax.Array, position_B: jax.Array, slot: jax.Array, mine: jax.Array | bool) -> Cache:
    """Writes one token per row into a local slot if it is `mine`; in place where the cache is donated."""

    def put(array: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        before = jax.lax.dynamic_slice_in_dim(array, slot, 1, axis)
        after = jnp.where(mine, jnp.expand_dims(new, axis), before)
        return jax.lax.dynamic_update_slice_in_dim(array, after, slot, axis)

    return Cache(put(cache.kv_n2BGcK, kv_n2BGK, 4), put(cache.position_Bc, position_B, 1))


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
    parts_NBGRk = jnp.concatenate((_gathered(local_BGRk, axis), own_BGRk[None]))
    weight_NBGR = jax.nn.softmax(parts_NBGRk[..., K], axis=0)
    o_BGRK = jnp.einsum("NBGR,NBGRK->BGRK", weight_NBGR, parts_NBGRk[..., :K])
    return o_BGRK.reshape(B, H, K).astype(q_BHK.dtype)


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
