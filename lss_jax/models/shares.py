"""Which weights are sharded at rest, over `seq` and `data`, and along which dimension (ZeRO-3, FSDP).

Source: Rajbhandari et al. 2020 (arXiv 1910.02054, Sec. 5.3), Zhao et al. 2023 (arXiv 2304.11277).
"""

import dataclasses
import math

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lss_jax.config.rules import next_multiple
from lss_jax.parallel.mesh import DATA, SEQ, sharded_axes
from lss_jax.parallel.weights import Share


@dataclasses.dataclass(frozen=True)
class Gathers:
    """How often a weight, or a slice of it, is gathered in a forward pass; 0 if it is not sharded at rest."""

    times: int
    of_layers: bool  # one layer's slice at a time, and once more in the backward pass


VECTORS = ("scale", "bias")  # of norms and linear maps: too small to be worth a gather
NOT_GATHERED = Gathers(0, False)


def shard_weights(module: nnx.Module, mesh: Mesh | AbstractMesh) -> None:
    """Marks each matrix of an abstract module as sharded over `seq` and `data`, and pads its shape if need be.

    The dimension is the first one that takes the least padding, of those that no other axis shards. Norms and biases
    stay replicated: of Llama 3 8B they are 0.003%.
    """
    axes = tuple(axis for axis in (SEQ, DATA) if axis in sharded_axes(mesh))
    count = math.prod(mesh.shape[axis] for axis in axes)
    if not axes:
        return
    for path, parameter in nnx.iter_graph(module):
        if (
            not isinstance(parameter, nnx.Param)
            or path[-1] in VECTORS
            or "row_per_position" in parameter.get_metadata()
        ):
            continue
        shape, first = parameter.shape, int("stacked" in parameter.get_metadata())
        parts = [*parameter.spec, *[None] * (len(shape) - len(parameter.spec))]
        free = [at for at in range(first, len(shape)) if parts[at] is None]
        if not free:
            continue
        at = min(free, key=lambda at: next_multiple(shape[at], count) / shape[at])
        padded = (*shape[:at], next_multiple(shape[at], count), *shape[at + 1 :])
        parameter.set_value(jax.ShapeDtypeStruct(padded, parameter.dtype))
        parameter.set_metadata(
            spec=PartitionSpec(*parts[:at], axes, *parts[at + 1 :]),
            share=Share(axes, dimension=at - first, size=shape[at]),
            gathers=Gathers(shape[0], True) if first else Gathers(1, False),
        )
