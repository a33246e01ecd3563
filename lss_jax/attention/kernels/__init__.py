"""What computes the rows of attention on one device, once all keys that they need are there.

A kernel is a pair. `forward(q_BlHK, kv_N2BGlK, mask, dropout, setting)` gives `o_BlHK` and what else it saves;
`backward(q_BlHK, kv_N2BGlK, mask, dropout, o_BlHK, saved, do_BlHK, setting)` gives `dq_BlHK` and, in float32,
`dkv_N2BGKl` (keys last).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lss_jax.attention.kernels import blockwise, dense, fused
from lss_jax.attention.kernels.targets import TARGETS


class Kernel(NamedTuple):
    """Rows of attention, and their gradient."""

    forward: Callable
    backward: Callable


KERNELS = {
    "blockwise": Kernel(blockwise.forward, blockwise.backward),
    "dense": Kernel(dense.forward, dense.backward),
    **{
        name: Kernel(partial(fused.forward, target=target), partial(fused.backward, target=target))
        for name, target in TARGETS.items()
    },
}
