"""Sequence-parallel attention: one file per strategy, one interface, to be read side by side.

A new strategy is one file, with its `Strategy` at the end or beside it, and one line in `STRATEGIES`.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax

from lss_jax.attention.linear import LINEAR
from lss_jax.attention.longformer import LONGFORMER
from lss_jax.attention.lss_strategy import LSS
from lss_jax.attention.mask import Intervals, MaskKind
from lss_jax.attention.pairs import Pairs
from lss_jax.attention.performer import PERFORMER
from lss_jax.attention.ring import RING
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import OPTIONS, Local, Shards, Strategy
from lss_jax.attention.ulysses import ULYSSES
from lss_jax.config.schema import AttentionConfig, Config, unknown_choice
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.scopes import ATTENTION, MASK

STRATEGIES: dict[str, Strategy] = {
    "lss": LSS,
    "ring": RING,
    "ulysses": ULYSSES,
    "linear": LINEAR,
    "performer": PERFORMER,
    "longformer": LONGFORMER,
}
EXACT = {name: strategy for name, strategy in STRATEGIES.items() if strategy.exact}

Attend = Callable[..., jax.Array]  # (q_BlHK, k_BlGK, v_BlGK, dropout, pairs) -> o_BlHK


def make_attend(strategy: str, mask: Intervals, setting: Setting, scope: str = ATTENTION) -> Attend:
    """The attention of every layer of a step: local `q_BlHK, k_BlGK, v_BlGK` dropout and pairs (or None) to `o_BlHK`.

    To be called inside `shard_map`; `mask` gives each local query its interval of natural key positions. Keys and
    values may be of another sequence, with a length and a layout of its own (`Setting.key_layout`).
    """
    chosen = STRATEGIES[strategy]
    if chosen.whole_mask:
        with jax.named_scope(MASK):
            mask = chosen.whole_mask(mask, setting)

    @jax.named_scope(scope)
    def attend(
        q_BlHK: jax.Array,
        k_BlGK: jax.Array,
        v_BlGK: jax.Array,
        dropout: Dropout | None = None,
        pairs: Pairs | None = None,
    ) -> jax.Array:
        return chosen.attention(Local(q_BlHK, k_BlGK, v_BlGK, mask, dropout, pairs), setting)

    return attend


def strategy_problems(attention: AttentionConfig, shards: Shards) -> Iterator[str]:
    """What the config's strategy cannot do, or has no use for, a line each."""
    name = attention.strategy
    if name not in STRATEGIES:
        yield unknown_choice("attention.strategy", name, STRATEGIES)
        return
    for key, option in OPTIONS.items():
        value = getattr(attention, key)
        if key not in STRATEGIES[name].options and value != option.unused:
            yield (
                f"attention.{key}={value} has no use with attention.strategy={name!r}, {option.useless}; "
                f"{option.remedy}"
            )
    yield from _group_problems(attention.head_groups, shards)
    yield from STRATEGIES[name].problems(attention, shards)


def mask_problems(config: Config, seen: MaskKind | None, shards: Shards) -> Iterator[str]:
    """What of a config and of its task's mask its strategy cannot express, a line each."""
    strategy = STRATEGIES[config.attention.strategy]
    if seen is not None:
        yield from strategy.refuses(config, seen, shards)
    elif not strategy.exact:
        yield (
            f"task={config.task!r} has a mask of which attention.strategy={config.attention.strategy!r} knows nothing; "
            f"use one that expresses any, {', '.join(map(repr, EXACT))}"
        )


def _group_problems(groups: int, shards: Shards) -> Iterator[str]:
    """Each group of heads has equally many on every device."""
    _, kv_heads, _, model = shards
    if groups < 1 or kv_heads < 1:
        return
    if kv_heads % groups:
        yield (
            f"model.kv_heads={kv_heads} is not divisible by attention.head_groups={groups}; "
            f"use attention.head_groups={kv_heads} or another divisor"
        )
    elif kv_heads // model % groups:
        yield (
            f"model.kv_heads={kv_heads} is not divisible by attention.head_groups={groups} times mesh.model={model}; "
            f"use attention.head_groups=1 or another divisor of {kv_heads // model}"
        )


def with_strategy(attention: AttentionConfig, strategy: str) -> AttentionConfig:
    """The same with another strategy, without the options that this one has no use for."""
    unused = {key: option.unused for key, option in OPTIONS.items() if key not in STRATEGIES[strategy].options}
    return dataclasses.replace(attention, strategy=strategy, **unused)
