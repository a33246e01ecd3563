"""Weights as they rest, sharded over `seq` and `data` or in host memory: the gradient law in its second form.

A sharded weight is gathered where it is used. In the backward pass the two sums of the law are two reduce-scatters,
first over `seq`, then over `data`, which leave each device its share of the finished gradient: the transpose of the
gather.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.parallel.host_memory import is_on_host, to_device, to_host
from lss_jax.parallel.mesh import DATA, SEQ
from lss_jax.parallel.scopes import WEIGHTS


class Share(NamedTuple):
    """How a device's share of a weight relates to the weight: one dimension of it is sharded over `axes`."""

    axes: tuple[str, ...]  # of `seq` and `data`, in this order, those with more than one device; maybe none
    dimension: int
    size: int  # of that dimension of the whole weight; the shares may have padding after it


def whole_weight(share: jax.Array, how: Share, dtype: str) -> jax.Array:
    """A weight in the compute dtype, gathered from its shares: over `data` first, while there is least to move.

    A share in the host's memory is moved to the device first, and its gradient back there.
    """
    return _whole_weight(share, how, dtype, is_on_host(share))


def fetched(share: jax.Array, how: Share, dtype: str) -> jax.Array:
    """The same of a weight that has no gradient: nothing is scattered."""
    return _gathered(share, how, dtype, False)[0]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _whole_weight(share: jax.Array, how: Share, dtype: str, on_host: bool) -> jax.Array:
    return _gathered(share, how, dtype, on_host)[0]


@jax.named_scope(WEIGHTS)
def _gathered(share: jax.Array, how: Share, dtype: str, _on_host: bool) -> tuple[jax.Array, None]:
    weight = to_device(share).astype(dtype)
    for axis in reversed(how.axes):
        weight = jax.lax.all_gather(weight, axis, axis=how.dimension, tiled=True)
    return jax.lax.slice_in_dim(weight, 0, how.size, axis=how.dimension), None


@jax.named_scope(WEIGHTS)
def _scattered(how: Share, _dtype: str, on_host: bool, _: None, d_weight: jax.Array) -> tuple[jax.Array]:
    """A device's partial gradient to its share of the finished one, in float32: the transpose of the gather."""
    missing = -how.size % math.prod(jax.lax.axis_size(axis) for axis in how.axes)
    widths = [(0, missing if axis == how.dimension else 0) for axis in range(d_weight.ndim)]
    d_weight = jnp.pad(d_weight.astype(jnp.float32), widths)
    if SEQ in how.axes:
        d_weight = jax.lax.psum_scatter(d_weight, SEQ, scatter_dimension=how.dimension, tiled=True)  # first average
    if DATA in how.axes:
        d_weight = jax.lax.psum_scatter(d_weight, DATA, scatter_dimension=how.dimension, tiled=True)  # second average
    return (to_host(d_weight) if on_host else d_weight,)


_whole_weight.defvjp(_gathered, _scattered)
