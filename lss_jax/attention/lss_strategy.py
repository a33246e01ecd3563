"""LSS as a strategy: what it needs, and what it holds on a device. The algorithm itself is `lss`."""

from collections.abc import Iterator

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.kernels.blockwise import blocks_of_keys, ordered_first
from lss_jax.attention.lss import lss_attention, traffic
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import Held, Shards, Strategy, own_segment
from lss_jax.attention.traffic import Sizes
from lss_jax.config.schema import AttentionConfig


def _problems(attention: AttentionConfig, shards: Shards) -> Iterator[str]:
    """Each group of heads has equally many on every device."""
    groups, (_, kv_heads, _, model) = attention.gather_groups, shards
    if groups < 1 or kv_heads < 1:
        return
    if kv_heads % groups:
        yield (
            f"model.kv_heads={kv_heads} is not divisible by attention.gather_groups={groups}; "
            f"use attention.gather_groups={kv_heads} or another divisor"
        )
    elif kv_heads // model % groups:
        yield (
            f"model.kv_heads={kv_heads} is not divisible by attention.gather_groups={groups} times mesh.model={model}; "
            f"use attention.gather_groups=1 or another divisor of {kv_heads // model}"
        )


def _held(sizes: Sizes, setting: Setting) -> Held:
    """The gathered keys and values, unless they are re-gathered in the backward pass."""
    pairs = sizes.pair * setting.layout.devices
    return Held(
        pair=sizes.pair,
        read=pairs,
        saved=sizes.pair if setting.regather else pairs,
        communicated=0 if setting.regather or setting.axis is None else pairs,
        exchanged=0,
        copies=3 if ordered_first(sizes.l, setting) else 2,
        in_work=(13, 4) if setting.regather else (12, 3),
    )


LSS = Strategy(
    attention=lss_attention,
    traffic=traffic,
    whole_mask=None,
    kernels=tuple(KERNELS),
    options=("gather_groups", "regather"),
    problems=_problems,
    held=_held,
    in_kernel=own_segment,
    key_blocks=blocks_of_keys,
)
