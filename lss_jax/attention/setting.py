"""What attention knows at compile time, and nothing of where it runs: see `placement` for that."""

import dataclasses

from lss_jax.parallel.layout import Layout


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of attention at compile time.

    `axis` is the mesh axis that shards the sequence, None if nothing does.
    """

    axis: str | None
    layout: Layout
    kernel: str
    block_queries: int
    block_keys: int
    regather: bool  # what came from other devices is communicated again in the backward pass, not saved
    interpret: bool  # fused kernels step by step, as on CPUs

    @property
    def unsharded(self) -> "Setting":
        """The same for whole sequences in natural order, as a device has them after an exchange of heads."""
        return dataclasses.replace(self, axis=None, layout=Layout("contiguous", 1))
