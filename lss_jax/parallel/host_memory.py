"""Arrays that rest in the host's memory: what computes with them moves a slice at a time to the device, and back.

The memory in which an array is belongs to its type (`jax.memory.Space`); these moves are all that changes it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

HOST = "pinned_host"  # the memory's kind, in shardings
SLICE = 2**26  # bytes of an array that are moved at a time: enough for a link's full speed, and little for a device


def to_device(array: jax.Array) -> jax.Array:
    """A copy in the device's memory."""
    return jax.device_put(array, jax.memory.Space.Device)


def to_host(array: jax.Array) -> jax.Array:
    """A copy in the host's memory."""
    return jax.device_put(array, jax.memory.Space.Host)


def is_on_host(array: Any) -> bool:
    """Whether an array, or one of this abstract type, is in the host's memory."""
    aval = array if isinstance(array, jax.core.ShapedArray) else jax.typeof(array)
    return aval.memory_space == jax.memory.Space.Host


def empty_on_host(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """An array in the host's memory with any content, to be filled; it varies over the mesh as the scalar `like`."""
    return jax.lax.broadcast(to_host(like), shape)  # of which a compiler makes memory, without a copy on the device


def zeros_on_host(shape: tuple[int, ...], zero: jax.Array) -> jax.Array:
    """Zeros in the host's memory, which vary over the mesh as the scalar `zero`."""
    return streamed(lambda part: jnp.broadcast_to(zero, part.shape), empty_on_host(shape, zero))


def streamed(function: Callable[..., Any], replaced: Any, *read: Any) -> Any:
    """`function(replaced, *read)`, which treats every element by itself, over slices; `replaced` takes the results.

    Args:
      function: from slices on the device to those that take the place of `replaced`'s.
      replaced: a tree of arrays on the host, local and all of one shape.
      read: more such trees.
    """
    count, cut = _slices((replaced, read))

    def replace(number: jax.Array, replaced: Any) -> Any:
        start, (slices, others) = cut(number, (replaced, read))
        new = function(slices, *others)
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda whole, part: put(whole, to_host(part), start, 0), replaced, new)

    return jax.lax.fori_loop(0, count, replace, replaced)


def elementwise(function: Callable[..., jax.Array], array: jax.Array, *others: jax.Array) -> jax.Array:
    """`function(array, *others)` of local arrays, element by element: `streamed` if they are on the host."""
    return streamed(function, array, *others) if is_on_host(array) else function(array, *others)


def streamed_sum(function: Callable[[jax.Array], jax.Array], array: jax.Array, start: jax.Array) -> jax.Array:
    """`start` and `function`, a scalar, of every slice of a local array on the host."""
    count, cut = _slices(array)
    return jax.lax.fori_loop(0, count, lambda number, total: total + function(cut(number, array)[1]), start)


def _slices(tree: Any) -> tuple[int, Callable[[jax.Array, Any], tuple[jax.Array, Any]]]:
    """How many slices arrays of one shape have along axis 0; and by number a slice's start, and the slices."""
    rows, *row = jax.tree.leaves(tree)[0].shape
    most = max(1, SLICE // (4 * math.prod(row)))
    size = next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)

    def cut(number: jax.Array, tree: Any) -> tuple[jax.Array, Any]:
        start = number * size
        return start, jax.tree.map(lambda a: to_device(jax.lax.dynamic_slice_in_dim(a, start, size)), tree)

    return rows // size, cut
