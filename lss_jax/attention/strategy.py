"""What a strategy is: what it is given, and all that the rest of the code asks about it.

A strategy is declared beside it, by its `Strategy`, and listed in `strategies`. Rules, the contract with the
compiler and the planner read the declaration; none knows a strategy by name.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from lss_jax.attention.kernels.blocks import KeyBlocks
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Setting
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.config.schema import AttentionConfig
from lss_jax.parallel.dropout import Dropout


class Local(NamedTuple):
    """What a strategy is given on each device, inside `shard_map`: its segment's queries, keys and values."""

    q_BlHK: jax.Array
    k_BlGK: jax.Array
    v_BlGK: jax.Array
    mask: Intervals  # the keys that each query sees; of all queries, where `Strategy.whole_mask` gathers them
    dropout: Dropout | None  # of attention weights


class Shards(NamedTuple):
    """The heads of a model, and over how many devices sequence (`seq`) and heads (`model`) are sharded."""

    heads: int
    kv_heads: int
    seq: int
    model: int


class Option(NamedTuple):
    """A key of the config's attention that only some strategies have a use for."""

    unused: Any  # its value where it does nothing
    useless: str  # why the other strategies have no use for it
    remedy: str


OPTIONS = {
    "regather": Option(False, "which saves nothing of other devices", "use attention.regather=False"),
}


class Strategy(NamedTuple):
    """A way to attend across a sharded sequence."""

    attention: Callable[[Local, Setting], jax.Array]  # this segment's output `o_BlHK`
    traffic: Callable[[Sizes, Setting], dict[str, list[Traffic]]]  # the collectives of one layer, by direction
    whole_mask: Callable[[Intervals, Setting], Intervals] | None  # gathers all queries' intervals, once per step
    kernels: tuple[str, ...]  # those that it can use
    options: tuple[str, ...]  # those of `OPTIONS` that it has a use for
    problems: Callable[[AttentionConfig, Shards], Iterable[str]]  # what it cannot do, a line each
    in_kernel: Callable[[Sizes, Setting], tuple[Sizes, Setting]]  # the sizes of a kernel's queries, and its setting
    recomputed: Callable[
        [Setting], tuple[bool, bool]
    ]  # whether queries, and keys and values, if only outputs are saved
    key_blocks: Callable[[int, Setting], KeyBlocks]  # that the blockwise kernel meets, of segments of this length


def own_segment(sizes: Sizes, setting: Setting) -> tuple[Sizes, Setting]:
    """`Strategy.in_kernel` where a device computes its own segment's queries, of all heads."""
    return sizes, setting
