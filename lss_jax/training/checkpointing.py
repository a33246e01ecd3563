"""The training state as checkpoints have it: in natural shapes, without the padding by which a mesh shards it.

Where there is no padding, which is the rule, nothing is changed. An array with padding is replicated on its way, since
its natural shape is one that the mesh does not divide.
"""

import math
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.models import Model, resized
from lss_jax.parallel.mesh import axes_of, like
from lss_jax.training.state import param_shardings


def params_like(model: Model, mesh: Mesh) -> Any:
    """Shapes and shardings of the parameters in the state."""
    return like(model.shapes, param_shardings(model, mesh))


def natural_like(stored: Any, natural_shapes: Any) -> Any:
    """Shapes and shardings of arrays like `stored` (`ShapeDtypeStruct`s) in a checkpoint, without padding.

    They are sharded as in the state, in the dimensions that the mesh divides.
    """

    def of_leaf(stored: jax.ShapeDtypeStruct, natural: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        mesh, spec = stored.sharding.mesh, stored.sharding.spec
        sizes = [math.prod(mesh.shape[axis] for axis in axes_of(part)) for part in spec]
        parts = [part if natural.shape[at] % sizes[at] == 0 else None for at, part in enumerate(spec)]
        placed = NamedSharding(mesh, P(*parts), memory_kind=stored.sharding.memory_kind)
        return jax.ShapeDtypeStruct(natural.shape, natural.dtype, sharding=placed)

    return jax.tree.map(of_leaf, stored, natural_shapes)


def converted(arrays: Any, to: Any) -> Any:
    """Global arrays with the shapes and shardings of `to`: padded with zeros, or without the padding."""

    def of_leaf(array: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
        return array if array.shape == to.shape else _resizing(to.shape, to.sharding)(array)

    return jax.tree.map(of_leaf, arrays, to)


@cache
def _resizing(shape: tuple[int, ...], placed: NamedSharding) -> jax.stages.Wrapped:
    return jax.jit(lambda array: resized(array, shape), out_shardings=placed)
