"""What computes attention on one device, once all keys that its queries see are there: three ways, one interface."""

from functools import partial

from lss_jax.attention.kernels import blockwise, dense, fused
from lss_jax.attention.kernels.interface import Kernel
from lss_jax.attention.kernels.targets import TARGETS

KERNELS = {
    "blockwise": Kernel(blockwise.forward, blockwise.backward),
    "dense": Kernel(dense.forward, dense.backward),
    **{
        name: Kernel(partial(fused.forward, target=target), partial(fused.backward, target=target))
        for name, target in TARGETS.items()
    },
}
