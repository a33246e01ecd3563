"""Which keys a query sees: one interval of natural positions per query, and never an `L x L` array."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Intervals(NamedTuple):
    """Query `i` sees the keys at natural positions `start_l[i] <= position < end_l[i]` (local, int32)."""

    start_l: jax.Array
    end_l: jax.Array


def causal(positions_l: jax.Array) -> Intervals:
    """Each token sees itself and what came before; `positions_l` are the queries' natural (global) positions."""
    return Intervals(jnp.zeros_like(positions_l), positions_l + 1)
