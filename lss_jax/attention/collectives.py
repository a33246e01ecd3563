"""LSS's two collectives on an axis that may have one device only, and the pair of keys and values that they move."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.residuals import COMMUNICATED


def stacked(k_BlGK: jax.Array, v_BlGK: jax.Array) -> jax.Array:
    """The pair as one array for one collective, in the kernels' order: `kv_2BGlK`."""
    return jnp.stack((k_BlGK, v_BlGK)).swapaxes(2, 3)


def all_gather(x: jax.Array, axis: str | None) -> jax.Array:
    """`x` of every device along the axis, stacked on a new leading axis; named, so that a policy can save it."""
    if axis is None:
        return x[None]
    return checkpoint_name(jax.lax.all_gather(x, axis), COMMUNICATED)


def psum_scatter(x_N: jax.Array, axis: str | None) -> jax.Array:
    """The sum of `x_N` over the devices along the axis, of which device `i` gets entry `i` of the leading axis.

    An entry travels as one vector: TPUs would split arrays into padded tiles, and mend the borders afterwards.
    """
    if axis is None:
        return x_N[0]
    N, *shape = x_N.shape
    return jax.lax.psum_scatter(x_N.reshape(N, -1), axis).reshape(shape)
