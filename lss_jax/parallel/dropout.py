"""Dropout that does not depend on the mesh: each element's fate is a hash of what it is, not of where it is computed.

An element is known by the seed, the step, the layer, the site in the layer, the batch row, its natural positions, and
its head or feature. Every mesh, layout and strategy therefore drops the same elements; and so does the backward pass of
blockwise attention, or a layer that is recomputed, with nothing saved.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.parallel.hashing import hashed, mixed

# The sites of a model; a site within a layer comes after the layer's number.
EMBEDDING, LAYER, ATTENTION_WEIGHTS, AFTER_ATTENTION, AFTER_MLP, CROSS_WEIGHTS, AFTER_CROSS = range(7)
OF_SOURCE = 7  # before all sites of an encoder


class Dropout(NamedTuple):
    """Dropout of this step over this device's batch rows and positions; `key` is a hash of everything above them."""

    rate: Any  # of the elements that become zero
    key: jax.Array  # uint32
    row_B: jax.Array  # in the global batch
    position_l: jax.Array  # natural
    first_head: Any  # of this device's heads, its number in the whole model

    def at(self, *coordinates: int | jax.Array) -> "Dropout":
        """Dropout at a place further down in the model: with these coordinates (layer, site) in its key."""
        return self._replace(key=hashed(self.key, *coordinates))

    def of_group(self, number: Any, heads: int) -> "Dropout":
        """Dropout of one of equal groups of this device's heads, which counts its heads from its own first."""
        return self._replace(first_head=self.first_head + number * heads)

    def of_heads(self, head_H: jax.Array) -> "PairDropout":
        """Dropout of the attention weights of these heads, counted from this device's first."""
        head_H = self.first_head + head_H
        return PairDropout(
            self.rate, hashed(self.key, self.row_B[:, None, None], self.position_l[None, :, None], head_H[None, None])
        )

    def __call__(self, x_BlE: jax.Array) -> jax.Array:
        """`x_BlE` with some elements zero and the others larger by `1 / (1 - rate)`."""
        stream_Bl = hashed(self.key, self.row_B[:, None], self.position_l[None])
        return dropped(x_BlE, stream_Bl[..., None], jnp.arange(x_BlE.shape[2]), self.rate)


class SharedDropout(NamedTuple):
    """Dropout of attention weights that is the same for all rows of the batch and all heads, as Flax has it."""

    rate: Any
    key: jax.Array
    row_B: jax.Array  # of which the number is enough
    position_l: jax.Array

    def of_group(self, _number: Any, _heads: int) -> "SharedDropout":
        """That of any group of heads."""
        return self

    def of_heads(self, head_H: jax.Array) -> "PairDropout":
        """That of any heads."""
        stream_l = hashed(self.key, self.position_l)
        shape = (len(self.row_B), len(self.position_l), len(head_H))
        return PairDropout(self.rate, jnp.broadcast_to(stream_l[None, :, None], shape))


class PairDropout(NamedTuple):
    """Dropout of attention weights: a hash for each query, to be met with the natural position of each key."""

    rate: Any
    stream_BlH: jax.Array
    first_B: jax.Array | None = None  # the natural position of a row's first key; None: that of the sequence


def dropped(x: jax.Array, stream: jax.Array, coordinate: jax.Array, rate: Any) -> jax.Array:
    """Drops elements of `x` by a hash of what they are so far (`stream`) and of one more coordinate; all broadcast."""
    coordinate = mixed(coordinate)
    bits = mixed(stream ^ coordinate[(None,) * (stream.ndim - coordinate.ndim)])
    keeps = bits >= (jnp.float32(rate) * 2.0**32).astype(jnp.uint32)
    return jnp.where(keeps, x.astype(jnp.float32) / (1.0 - jnp.float32(rate)), 0.0).astype(x.dtype)
