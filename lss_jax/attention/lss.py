"""LSS attention (arXiv 2311.02382, Sec. 3): each device computes its own rows, nobody ever aggregates them.

Two collectives per layer and training step: one gather of keys and values on the way forward, one scatter of their
gradients on the way back. Nvidia's sequence parallelism needs eight.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.dense import attention_rows
from lss_jax.attention.mask import Intervals

GATHERED = "gathered_keys_values"  # what a rematerialized block keeps, so that it does not gather again


def lss_attention(
    q_BlHK: jax.Array, k_BlGK: jax.Array, v_BlGK: jax.Array, *, mask: Intervals, axis: str | None
) -> jax.Array:
    """This segment's rows of attention, `o_BlHK`, from local `q, k, v`, inside `shard_map` over mesh axis `axis`.

    `axis` is None where the sequence is not cut: then the segment is the sequence and nothing is gathered.
    """
    kv_2BlGK = jnp.stack((k_BlGK, v_BlGK))
    kv_2BLGK = fused_all_gather(kv_2BlGK, axis) if axis else kv_2BlGK  # every query needs every key
    k_BLGK, v_BLGK = checkpoint_name(kv_2BLGK, GATHERED)
    return attention_rows(q_BlHK, k_BLGK, v_BLGK, mask)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fused_all_gather(kv_2BlGK: jax.Array, axis: str) -> jax.Array:
    """All segments' keys and values in one collective, `kv_2BLGK`; its transpose is one reduce-scatter."""
    return jax.lax.all_gather(kv_2BlGK, axis, axis=2, tiled=True)


def _gather_forward(kv_2BlGK, axis):
    return fused_all_gather(kv_2BlGK, axis), None


def _scatter_backward(axis, _, dkv_2BLGK):
    # Every device holds its rows' share of all gradients; the sum over devices, each keeping its own segment.
    return (jax.lax.psum_scatter(dkv_2BLGK, axis, scatter_dimension=2, tiled=True),)


fused_all_gather.defvjp(_gather_forward, _scatter_backward)
