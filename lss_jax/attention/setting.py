"""What attention knows at compile time, and nothing of where it runs: see `placement` for that."""

import dataclasses
from typing import NamedTuple

from lss_jax.parallel.layout import SEQUENCE, SOURCE, Layout


class Between(NamedTuple):
    """Which sequence the queries of an attention are of, and which one its keys and values are of."""

    queries: str
    keys: str


SELF, IN_SOURCE, CROSS = Between(SEQUENCE, SEQUENCE), Between(SOURCE, SOURCE), Between(SEQUENCE, SOURCE)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of attention at compile time.

    `axis` is the mesh axis that shards the sequences, None if nothing does. In self-attention both layouts are alike.
    """

    axis: str | None
    layout: Layout  # of the queries
    key_layout: Layout  # of the keys and values, whose length is that of their arrays
    kernel: str
    block_queries: int
    block_keys: int
    regather: bool  # what came from other devices is communicated again in the backward pass, not saved
    interpret: bool  # fused kernels step by step, as on CPUs

    @property
    def unsharded(self) -> "Setting":
        """The same for whole sequences in natural order, as a device has them after an exchange of heads."""
        whole = Layout("contiguous", 1)
        return dataclasses.replace(self, axis=None, layout=whole, key_layout=whole)
