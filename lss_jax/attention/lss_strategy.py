"""LSS as a strategy: what it needs. The algorithm itself is `lss`."""

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.kernels.blockwise import blocks_of_keys
from lss_jax.attention.lss import lss_attention, traffic
from lss_jax.attention.strategy import Strategy, own_segment, refuses_nothing

LSS = Strategy(
    exact=True,
    defined_by=(),
    attention=lss_attention,
    traffic=traffic,
    whole_mask=None,
    kernels=tuple(KERNELS),
    options=("regather",),
    problems=lambda _attention, _shards: (),
    refuses=refuses_nothing,
    own_window=False,
    in_kernel=own_segment,
    recomputed=lambda setting: (True, setting.regather or setting.axis is None),
    key_blocks=blocks_of_keys,
    operations=None,
)
