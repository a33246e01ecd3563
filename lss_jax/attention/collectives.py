"""LSS's two collectives on an axis that may have one device only, and the pair of keys and values that they move."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.parallel.residuals import COMMUNICATED

TILE = 128  # numbers in a row of a TPU's tile


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

    An entry whose rows are no whole tiles travels as one vector: TPUs would pad it, and mend the borders afterwards.
    """
    if axis is None:
        return x_N[0]
    N, *shape = x_N.shape
    if shape[-1] % TILE == 0:
        return jax.lax.psum_scatter(x_N, axis)
    return jax.lax.psum_scatter(x_N.reshape(N, -1), axis).reshape(shape)


def after(done: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, but not before `done` has been computed.

    No number is greater than infinity, but XLA does not know it. (On CPU it forgets `optimization_barrier` before it
    decides on an order.)
    """
    never = done[(0,) * done.ndim] > jnp.inf
    return jnp.where(never, 0, x)
