"""Which keys a query sees: one interval of natural positions per query, and never an `L x L` array.

Every mask of long-context work is one: causal, bidirectional, a sliding window, packed documents, a prefix, padding;
and so is every intersection of them. Positions are natural (global), whatever the layout.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Intervals(NamedTuple):
    """A query sees the keys at natural positions `start <= position < end`, and none where `end <= start`.

    Both are int32, `[l]` for all batch rows, or `[B, l]`.
    """

    start: jax.Array
    end: jax.Array

    def __and__(self, other: "Intervals") -> "Intervals":
        """The keys that both show."""
        dimensions = max(bound.ndim for bound in (*self, *other))
        ours, theirs = ([lifted(bound, dimensions) for bound in mask] for mask in (self, other))
        return Intervals(jnp.maximum(ours[0], theirs[0]), jnp.minimum(ours[1], theirs[1]))

    def sees(self, key_L: jax.Array) -> jax.Array:
        """Booleans `[..., l, L]`: for the dense reference, and for one block at a time."""
        start, end = (bound[..., None] for bound in self)
        return (start <= lifted(key_L, start.ndim)) & (lifted(key_L, end.ndim) < end)


def lifted(x: Any, dimensions: int) -> Any:
    """An array with leading axes of size 1, as many as it takes to have this many axes: NumPy's rule, said out loud."""
    return x[(None,) * (dimensions - x.ndim)]


class MaskKind(NamedTuple):
    """What a task's masks are made of, whatever the batch: what a strategy has to express.

    Exact strategies express any mask and do not ask. The others must know before anything is compiled.
    """

    causal: bool  # a token sees nothing after itself; if not, all of its row
    window: int  # the width of a sliding window; 0: none
    prefix: int  # first tokens that see one another under a causal mask
    documents: bool  # rows hold several documents, which do not see one another
    padded: bool  # rows end at lengths of their own


def bidirectional(positions_l: jax.Array, length: int) -> Intervals:
    """Each token sees all of the `length` tokens; the padding behind them is masked out, as keys and as queries."""
    start = jnp.zeros_like(positions_l)
    return Intervals(start, jnp.where(positions_l < length, length, start))


def first_keys(positions_l: jax.Array, length: Any, keys: Any) -> Intervals:
    """The first `length` tokens see the first `keys` keys, of their own sequence or another; padding sees none.

    Both are numbers for all rows, or `[B, 1]`.
    """
    end = jnp.where(positions_l < length, keys, 0).astype(jnp.int32)
    return Intervals(jnp.zeros_like(end), end)


def causal(positions_l: jax.Array) -> Intervals:
    """Each token sees itself and what came before."""
    return Intervals(jnp.zeros_like(positions_l), positions_l + 1)


def prefix_causal(positions_l: jax.Array, prefix: int) -> Intervals:
    """Causal, but the first `prefix` tokens see one another (Raffel et al. 2020, arXiv 1910.10683, Sec. 3.2.1)."""
    return Intervals(jnp.zeros_like(positions_l), jnp.maximum(positions_l + 1, prefix))


def window(positions_l: jax.Array, width: int) -> Intervals:
    """Each token sees the `width` tokens that end with itself, and all later ones: for a causal mask to meet."""
    start = jnp.maximum(positions_l - (width - 1), 0)
    return Intervals(start, jnp.full_like(start, jnp.iinfo(jnp.int32).max))


def neighbours(positions_l: jax.Array, left: int, right: int) -> Intervals:
    """Each token sees itself, `left` tokens before it and `right` tokens after it."""
    return Intervals(jnp.maximum(positions_l - left, 0), positions_l + right + 1)


def of_patches(mask: Intervals, patch: int) -> Intervals:
    """The patches of so many tokens that each patch sees: those in which its first token sees anything."""
    return Intervals(mask.start[..., ::patch] // patch, -(-mask.end[..., ::patch] // patch))


def documents(bounds_2Bl: jax.Array) -> Intervals:
    """Each token sees its own document: `bounds_2Bl` has where that starts and where it ends (exclusive)."""
    return Intervals(bounds_2Bl[0], bounds_2Bl[1])


def packed(document_BL: jax.Array) -> Intervals:
    """The same, from the number of each token's document: `[..., L]`, the whole sequence in natural order.

    A document is a run of equal numbers; a number may come back after another document.
    """
    position_L, axis = jnp.arange(document_BL.shape[-1], dtype=jnp.int32), document_BL.ndim - 1
    differs = document_BL[..., 1:] != document_BL[..., :-1]
    edge = jnp.ones_like(differs, shape=(*document_BL.shape[:-1], 1))
    first, last = (jnp.concatenate(parts, -1) for parts in ((edge, differs), (differs, edge)))
    start_BL = jax.lax.cummax(jnp.where(first, position_L, 0), axis)
    end_BL = jax.lax.cummin(jnp.where(last, position_L + 1, len(position_L)), axis, reverse=True)
    return Intervals(start_BL, end_BL)
