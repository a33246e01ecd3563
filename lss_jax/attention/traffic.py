"""What attention moves: the collectives of a strategy, and the sizes of one call on one device."""

import dataclasses
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.setting import SELF, Between
from lss_jax.config.schema import Config
from lss_jax.parallel.layout import padded_length
from lss_jax.parallel.mesh import DATA, MODEL, SEQ


class Traffic(NamedTuple):
    """A collective that a strategy asks for, per layer and microbatch, as the compiled program should show it."""

    kind: str  # as XLA calls it
    times: int
    elements: int  # of its result on one device
    itemsize: int

    @property
    def bytes(self) -> int:
        """The size of its result on one device."""
        return self.elements * self.itemsize


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One call of attention on one device: `l` and `s` are the (padded) segments of the queries and of the keys.

    `itemsize` is that of the compute dtype. In self-attention both segments are the same.
    """

    B: int
    l: int
    s: int
    H: int
    G: int
    K: int
    itemsize: int

    @property
    def pair(self) -> int:
        """Numbers in this segment's keys and values."""
        return 2 * self.B * self.s * self.G * self.K


def sizes_of(config: Config, mesh: Mesh | AbstractMesh, between: Between = SELF) -> Sizes:
    """What one call of attention works on, on one device."""
    return Sizes(
        B=config.data.batch_size // mesh.shape[DATA] // config.optim.accumulate,
        l=padded_length(config, mesh, between.queries) // mesh.shape[SEQ],
        s=padded_length(config, mesh, between.keys) // mesh.shape[SEQ],
        H=config.model.heads // mesh.shape[MODEL],
        G=config.model.kv_heads // mesh.shape[MODEL],
        K=config.model.head_width,
        itemsize=2 if config.model.dtype == "bfloat16" else 4,
    )
