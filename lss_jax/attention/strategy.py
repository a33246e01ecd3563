"""What a strategy is given, and what it declares about itself."""

from typing import NamedTuple

import jax

from lss_jax.attention.mask import Intervals
from lss_jax.parallel.dropout import Dropout


class Local(NamedTuple):
    """What a strategy is given on each device, inside `shard_map`: its segment's queries, keys and values."""

    q_BlHK: jax.Array
    k_BlGK: jax.Array
    v_BlGK: jax.Array
    mask: Intervals  # the keys that each query sees, in natural positions; as `Strategy.whole_mask` has it, if it does
    dropout: Dropout | None  # of attention weights
