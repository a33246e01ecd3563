"""LSS as a strategy: what it needs. The algorithm itself is `lss`."""

import dataclasses

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.kernels.blockwise import blocks_of_keys
from lss_jax.attention.lss import lss_attention, traffic
from lss_jax.attention.nearby import in_runs, runs_of
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import InKernel, Shown, Strategy, own_segment, refuses_nothing
from lss_jax.attention.traffic import Sizes


def _in_kernel(shown: Shown, sizes: Sizes, setting: Setting) -> InKernel:
    """A device's own segment; where it has runs of its chunks, each with the keys of its own."""
    whole, runs = own_segment(shown, sizes, setting), runs_of(sizes.s, setting)
    if not runs:
        return whole
    masks = [in_runs(mask, runs, device, sizes.B) for device, mask in enumerate(whole.masks)]
    rows = sizes.B * setting.layout.chunks_per_device
    of_chunks = dataclasses.replace(sizes, B=rows, l=runs.chunk, s=runs.length)
    return InKernel(of_chunks, setting.unsharded, masks)


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
    in_kernel=_in_kernel,
    recomputed=lambda setting: (True, setting.regather or setting.axis is None),
    key_blocks=blocks_of_keys,
    operations=None,
)
