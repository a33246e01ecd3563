"""One mesh, three axes: `data` x `seq` x `model`; every sharding of the project is said in these names."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

DATA, SEQ, MODEL = "data", "seq", "model"
AXES = (DATA, SEQ, MODEL)


def make_mesh(sizes: tuple[int, int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `sizes` (data, seq, model) with neighbouring devices in one sequence group, as the paper has it.

    The last axis varies fastest over the devices, so `model`, then `seq` stay within a node where they fit. On TPUs an
    axis lies along whole links of the torus if it can, and along parts of them (8 of links of 6, 6 and 4) if not.
    """
    devices = jax.devices() if devices is None else devices
    try:
        placed = mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """The mesh of `sizes` without devices, to trace for."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharded_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes with more than one device: only these may leave a collective in the compiled program."""
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)


def sequence_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those of them that shard a sequence: into segments, and these into parts."""
    return tuple(axis for axis in sharded_axes(mesh) if axis != DATA)


def has_host_memory(mesh: Mesh | AbstractMesh) -> bool:
    """Whether there is a memory beside the devices' own, as for accelerators; an abstract mesh is taken for them."""
    return isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "cpu"


def axis_if_sharded(axis: str, mesh: Mesh | AbstractMesh) -> str | None:
    """The axis, None if it has one device."""
    return axis if axis in sharded_axes(mesh) else None


def named_axes(spec: PartitionSpec) -> frozenset[str]:
    """The mesh axes that a spec names: `P(None, ("seq", "model"))` names two."""
    return frozenset(axis for part in spec for axis in axes_of(part))


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes that shard one dimension, the slowest first, from its part of a spec."""
    return (part,) if isinstance(part, str) else part or ()


def without_unsharded(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec without the axes of size 1.

    What is not sharded does not vary: with these specs `shard_map` sees values that do not vary over an axis of size
    1, and nothing asks for a collective there (XLA on CPU would leave it in the program).
    """
    sharded = sharded_axes(mesh)

    def without(part):
        axes = tuple(axis for axis in axes_of(part) if axis in sharded)
        return axes[0] if len(axes) == 1 else axes or None

    return PartitionSpec(*map(without, spec))


def shardings(specs, mesh: Mesh | AbstractMesh):
    """A tree of specs as a tree of shardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, without_unsharded(spec, mesh)), specs)


def shard_bytes(array: Any, sharding: Sharding) -> int:
    """Bytes per device of an array with this shape and dtype."""
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize


def like(shapes: Any, shardings: Any) -> Any:
    """Global shapes placed by shardings: what restoring wants to know."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
