"""Sequence-parallel attention: one file per strategy, one interface, to be read side by side.

A strategy maps this device's `q_BlHK, k_BlGK, v_BlGK` to its rows `o_BlHK`, inside `shard_map`; a mask gives each local
query its interval of natural key positions. Each says beside its collectives what the compiled program should show.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lss_jax.attention import lss, ring, ulysses
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import Local
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.scopes import ATTENTION, MASK


class Strategy(NamedTuple):
    """A way to attend across a cut sequence, and the collectives of one layer that it takes."""

    attention: Callable[..., jax.Array]
    traffic: Callable


STRATEGIES = {
    "lss": Strategy(lss.lss_attention, lss.traffic),
    "ring": Strategy(ring.ring_attention, ring.traffic),
    "ulysses": Strategy(ulysses.ulysses_attention, ulysses.traffic),
}

Attend = Callable[..., jax.Array]  # (q_BlHK, k_BlGK, v_BlGK, dropout) -> o_BlHK


def make_attend(strategy: str, mask: Intervals, setting: Setting) -> Attend:
    """The attention of every layer of a step: local `q_BlHK, k_BlGK, v_BlGK` and dropout (or None) to `o_BlHK`."""
    if strategy == "ulysses":
        with jax.named_scope(MASK):
            mask = ulysses.whole_mask(mask, setting)

    @jax.named_scope(ATTENTION)
    def attend(q_BlHK: jax.Array, k_BlGK: jax.Array, v_BlGK: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        return STRATEGIES[strategy].attention(Local(q_BlHK, k_BlGK, v_BlGK, mask, dropout), setting)

    return attend
