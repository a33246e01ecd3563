"""Which keys a query sees: one interval of natural positions per query, and never an `L x L` array.

Every mask of long-context work is one: causal, bidirectional, a sliding window, packed documents, a prefix, padding;
and so is every intersection of them. Positions are natural (global), whatever the layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Intervals(NamedTuple):
    """A query sees the keys at natural positions `start <= position < end`, and none where `end <= start`.

    Both are int32, `[l]` for all rows of the batch, or `[B, l]`.
    """

    start: jax.Array
    end: jax.Array

    def __and__(self, other: "Intervals") -> "Intervals":
        """The keys that both show."""
        return Intervals(jnp.maximum(self.start, other.start), jnp.minimum(self.end, other.end))

    def sees(self, key_L: jax.Array) -> jax.Array:
        """Booleans `[..., l, L]`: for the dense reference, and for one block at a time."""
        return (self.start[..., None] <= key_L) & (key_L < self.end[..., None])


def bidirectional(positions_l: jax.Array, length: int) -> Intervals:
    """Each token sees all of the `length` tokens; the padding behind them is seen by none, and sees none."""
    start = jnp.zeros_like(positions_l)
    return Intervals(start, jnp.where(positions_l < length, length, start))


def causal(positions_l: jax.Array) -> Intervals:
    """Each token sees itself and what came before."""
    return Intervals(jnp.zeros_like(positions_l), positions_l + 1)


def prefix_causal(positions_l: jax.Array, prefix: int) -> Intervals:
    """Causal, but the first `prefix` tokens see one another (Raffel et al. 2020, arXiv 1910.10683, Sec. 3.2.1)."""
    return Intervals(jnp.zeros_like(positions_l), jnp.maximum(positions_l + 1, prefix))


def window(positions_l: jax.Array, width: int) -> Intervals:
    """Each token sees the `width` tokens that end with itself, and all later ones: to be met with a causal mask."""
    start = jnp.maximum(positions_l - (width - 1), 0)
    return Intervals(start, jnp.full_like(start, jnp.iinfo(jnp.int32).max))


def documents(bounds_2Bl: jax.Array) -> Intervals:
    """Each token sees its own document: `bounds_2Bl` has where that starts and where it ends (exclusive)."""
    return Intervals(bounds_2Bl[0], bounds_2Bl[1])
