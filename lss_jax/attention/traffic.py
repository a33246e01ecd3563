"""What attention moves: the collectives of a strategy, and the sizes of one call on one device."""

import dataclasses
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from lss_jax.config.schema import Config
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import DATA


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
    """One call of attention on one device: `l` is the (padded) segment, `itemsize` that of the compute dtype."""

    B: int
    l: int
    H: int
    G: int
    K: int
    itemsize: int

    @property
    def pair(self) -> int:
        """Numbers in this segment's keys and values."""
        return 2 * self.B * self.l * self.G * self.K


def sizes_of(config: Config, mesh: Mesh | AbstractMesh) -> Sizes:
    """What one call of attention works on, on one device."""
    layout = layout_on(config, mesh)
    return Sizes(
        B=config.data.batch_size // mesh.shape[DATA] // config.optim.accumulate,
        l=layout.padded(config.data.seq_len) // layout.devices,
        H=config.model.heads // layout.parts,
        G=config.model.kv_heads // layout.parts,
        K=config.model.head_width,
        itemsize=2 if config.model.dtype == "bfloat16" else 4,
    )
