"""Nvidia's tensor and sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198): weights sharded over `model`.

The devices of a model group share a segment. Between regions each holds its part of it, `x_BpE`, for residuals, norms,
dropout and loss; inside a region (attention, or the MLP) each holds all of it, for its own heads or columns. In with a
gather, out with a scatter, and their transposes in the backward pass: 4 + 4 collectives per layer.

Everywhere `axis` is the mesh axis of the model group, None if nothing is sharded over it.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.parallel.residuals import REGION_OUTPUT


def gather_sequence(x_BpE: jax.Array, axis: str | None) -> jax.Array:
    """Into a region: every head and column needs every token of the segment, `x_BlE`."""
    if axis is None:
        return x_BpE
    return jax.lax.all_gather(x_BpE, axis, axis=1, tiled=True)


def scatter_sequence(x_BlE: jax.Array, axis: str | None) -> jax.Array:
    """Out of a region: the sum of all devices' terms, of which each gets its own tokens', `x_BpE`.

    The terms travel in the compute dtype, as Megatron's: the residual that they are added to is rounded to it as well.
    """
    if axis is None:
        return x_BlE
    return checkpoint_name(jax.lax.psum_scatter(x_BlE, axis, scatter_dimension=1, tiled=True), REGION_OUTPUT)


def own_part(x: jax.Array, axis: str | None, dimension: int) -> jax.Array:
    """This device's part of what its whole model group has: `l` to `p` in one dimension, without a collective."""
    if axis is None:
        return x
    size = x.shape[dimension] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dimension)


def own_numbers(number: jax.Array, count: int, axis: str) -> tuple[jax.Array, jax.Array]:
    """Global numbers of things that are sharded, `count` per device, as numbers on this device, and which are here.

    What is elsewhere gets a number too, so that something can be read, and masked out.
    """
    here = number - jax.lax.axis_index(axis) * count
    return jnp.clip(here, 0, count - 1), (here >= 0) & (here < count)
