"""What a strategy is: what it is given, and all that the rest of the code asks about it.

A strategy is declared beside it, by its `Strategy`, and listed in `strategies`. Rules, the contract with the
compiler and the planner read the declaration; none knows a strategy by name.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.attention.kernels.blocks import KeyBlocks
from lss_jax.attention.mask import Intervals, MaskKind
from lss_jax.attention.pairs import Pairs
from lss_jax.attention.setting import Setting
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.config.schema import AttentionConfig, Config
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.layout import Layout


class Local(NamedTuple):
    """What a strategy is given on each device, inside `shard_map`: its segment's queries, keys and values."""

    q_BlHK: jax.Array
    k_BlGK: jax.Array
    v_BlGK: jax.Array
    mask: Intervals  # the keys that each query sees; of all queries, where `Strategy.whole_mask` gathers them
    dropout: Dropout | None  # of attention weights
    pairs: Pairs | None  # a mask array and a bias of local queries and all keys, of others' models


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
    "global_tokens": Option(0, "whose tokens see what the mask shows", "use attention.global_tokens=0"),
    "features": Option(0, "which has no random features", "use attention.features=0"),
}


Shown = Callable[[jax.Array], Intervals]  # the task's mask of queries at these natural positions


class Operations(NamedTuple):
    """Operations of matrix products in one layer's attention, on the busiest device."""

    forward: int
    training: int  # in both passes


class InKernel(NamedTuple):
    """What a kernel is given, to count what it computes."""

    sizes: Sizes
    setting: Setting
    masks: list[Intervals]  # what the queries of each device see; of one, if all are alike


class Strategy(NamedTuple):
    """A way to attend across a sharded sequence.

    An `exact` one computes softmax attention over all that the mask shows. Any other one is another model: nobody
    recommends it, takes it in place of an exact one, or generates text from its keys and values.
    """

    exact: bool
    defined_by: tuple[str, ...]  # config keys that decide what it computes, if it is not exact
    attention: Callable[[Local, Setting], Any]  # this segment's output `o_BlHK`, or `Attended` if scores are asked for
    traffic: Callable[[Sizes, Setting], dict[str, list[Traffic]]]  # the collectives of one layer, by direction
    whole_mask: Callable[[Intervals, Setting], Intervals] | None  # gathers all queries' intervals, once per step
    kernels: tuple[str, ...]  # those that it can use
    options: tuple[str, ...]  # those of `OPTIONS` that it has a use for
    problems: Callable[[AttentionConfig, Shards], Iterable[str]]  # what it cannot do, a line each
    # What of a config and of its task's mask it cannot express, a line each.
    refuses: Callable[[Config, MaskKind, Shards], Iterable[str]]
    own_window: bool  # whether `attention.window` is a matter of the strategy, and not of the task's mask
    # What a kernel is given; and the key blocks that the blockwise kernel meets, of segments of a length. Both None:
    # `operations` instead.
    in_kernel: Callable[[Shown, Sizes, Setting], InKernel] | None
    recomputed: Callable[
        [Setting], tuple[bool, bool]
    ]  # whether queries, and keys and values, if only outputs are saved
    key_blocks: Callable[[int, Setting], KeyBlocks] | None
    operations: Callable[[Shown, Sizes, Setting], Operations] | None  # None: those of a kernel over `key_blocks`


def refuses_nothing(_config: Config, _seen: MaskKind, _shards: Shards) -> Iterable[str]:
    """`Strategy.refuses` of exact strategies, which express any mask."""
    return ()


def own_segment(shown: Shown, sizes: Sizes, setting: Setting) -> InKernel:
    """`Strategy.in_kernel` where a device computes its own segment's queries, of all heads."""
    return InKernel(sizes, setting, masks_of_devices(shown, sizes.l, setting.layout))


def masks_of_devices(shown: Shown, l: int, layout: Layout) -> list[Intervals]:
    """What the segment of `l` queries of each device sees."""
    return [shown(jnp.asarray(positions_l)) for positions_l in layout.positions(l * layout.devices).reshape(-1, l)]
