"""LSS as a strategy: what it needs, and what it holds on a device. The algorithm itself is `lss`."""

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.kernels.blockwise import blocks_of_keys, ordered_first
from lss_jax.attention.lss import lss_attention, traffic
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import Held, Strategy, own_segment
from lss_jax.attention.traffic import Sizes


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
    options=("regather",),
    problems=lambda _attention, _shards: (),
    held=_held,
    in_kernel=own_segment,
    recomputed=lambda setting: (True, setting.regather or setting.axis is None),
    key_blocks=blocks_of_keys,
)
