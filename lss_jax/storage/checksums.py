"""Checksums of global arrays, equal on every mesh and for every number of processes; no array is gathered for them.

Each element gives a hash of its bits and its index, and the hashes are added up modulo 2**32, with two salts. The sums
do not depend on how the array is sharded, and any change of a single element changes them for certain.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.parallel.hashing import mixed
from lss_jax.parallel.host_memory import is_on_host, to_device

AT_ONCE = 2**22  # elements on the host whose checksum is computed at once
SALTS = (0, 0x5BD1E995)
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the size of an element


def checksums(tree: Any) -> dict[str, str]:
    """The checksum of every array of a tree (64 bits, in hexadecimal), by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {_name(path): leaf for path, leaf in leaves}
    sums: dict[str, Any] = {}
    for names in _computed_together(arrays):
        found = _summing(leaves[0][1].sharding.mesh)([arrays[name] for name in names])
        sums |= zip(names, jax.device_get(found), strict=True)
    return {name: _hexadecimal(sums[name]) for name in arrays}


class Checksum:
    """The checksum of one array that comes in pieces, in its row-major order."""

    def __init__(self) -> None:
        self._total, self._start = jnp.zeros(len(SALTS), jnp.uint32), 0

    def add(self, piece: np.ndarray) -> None:
        """Adds the next piece."""
        for part in np.split(piece.reshape(-1), range(AT_ONCE, piece.size, AT_ONCE)):
            self._total += _flat_checksum(part, np.uint32(self._start % 2**32))
            self._start += part.size

    def __str__(self) -> str:
        return _hexadecimal(jax.device_get(self._total))


def _computed_together(arrays: dict[str, jax.Array]) -> list[list[str]]:
    """The names of all arrays on the devices, and those of each in host memory by itself: devices may not hold two."""
    together = [name for name, array in arrays.items() if not is_on_host(array)]
    return [together, *([name] for name, array in arrays.items() if is_on_host(array))]


@functools.lru_cache(maxsize=2)
def _summing(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda arrays: [_checksum(array) for array in arrays], out_shardings=NamedSharding(mesh, P()))


def _checksum(array: jax.Array) -> jax.Array:
    index = jnp.uint32(0)
    for axis, size in enumerate(array.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return _sums(to_device(array), index)


@jax.jit
def _flat_checksum(array: jax.Array, start: jax.Array) -> jax.Array:
    return _sums(array, start + jax.lax.iota(jnp.uint32, array.size))


def _sums(array: jax.Array, index: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(array, UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    return jnp.stack([jnp.sum(mixed(bits ^ mixed(index + jnp.uint32(salt))), dtype=jnp.uint32) for salt in SALTS])


def _hexadecimal(sums: Any) -> str:
    return "".join(f"{word:08x}" for word in sums)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
