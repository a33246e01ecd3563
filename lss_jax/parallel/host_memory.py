"""Arrays that rest in the host's memory: what computes with them moves a slice at a time to the device, and back.

The memory in which an array is belongs to its type (`jax.memory.Space`); these moves are all that changes it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

HOST = "pinned_host"  # the memory's kind, in shardings
SLICE = 2**26  # bytes of an array that are moved at a time, or one row: enough for a link's full speed
ALIGNED = 16  # rows of a slice, or a multiple of them, if there are more: registers of TPUs hold so many of bfloat16
LOOP = 4  # slices at least, where there are as many rows: compilers unroll shorter loops, and hold all slices at once


def to_device(array: jax.Array) -> jax.Array:
    """The array in the device's memory: a copy, unless it is there already."""
    return jax.device_put(array, jax.memory.Space.Device) if is_on_host(array) else array


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

    def replace(start: Any, size: int, replaced: Any) -> Any:
        slices, others = _sliced((replaced, read), start, size)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(lambda whole, part: put(whole, to_host(part)), replaced, function(slices, *others))

    return _over_slices(*_rows(jax.tree.leaves(replaced)[0]), replace, replaced)


def elementwise(function: Callable[..., jax.Array], array: jax.Array, *others: jax.Array) -> jax.Array:
    """`function(array, *others)` of local arrays, element by element: `streamed` if they are on the host."""
    return streamed(function, array, *others) if is_on_host(array) else function(array, *others)


def streamed_sum(function: Callable[[jax.Array], jax.Array], array: jax.Array, start: jax.Array) -> jax.Array:
    """`start` and `function`, a scalar, of every slice of a local array on the host."""

    def add(start: Any, size: int, total: jax.Array) -> jax.Array:
        return total + function(_sliced(array, start, size))

    return _over_slices(*_rows(array), add, start)


def _over_slices(rows: int, row: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """`carry = body(start, size, carry)` for slices along axis 0 that cover arrays of so many rows of `row` bytes."""
    size = max(1, min(SLICE // row, rows // LOOP))
    size = size // ALIGNED * ALIGNED or size
    carry = jax.lax.fori_loop(0, rows // size, lambda number, carry: body(number * size, size, carry), carry)
    return body(rows - rows % size, rows % size, carry) if rows % size else carry


def _rows(array: jax.Array) -> tuple[int, int]:
    """The number of rows of an array, and the bytes of one in float32."""
    return len(array), 4 * math.prod(array.shape[1:])


def _sliced(tree: Any, start: Any, size: int) -> Any:
    """A slice of each array, on the device."""
    return jax.tree.map(lambda array: to_device(jax.lax.dynamic_slice_in_dim(array, start, size)), tree)
