"""One layer's parameter of ours as a tensor of theirs, or a part of one: shapes and values, in either direction."""

import math
from collections.abc import Callable

import numpy as np

from lss_jax.huggingface.families import Theirs

Shape = tuple[int, ...]
LAYERS = "{}"  # in a name of theirs: there is one for each layer


def their_shape(theirs: Theirs, shape: Shape) -> Shape:
    """The shape of their tensor for one layer's parameter of ours with this shape."""
    rows, columns = math.prod(shape[: theirs.inputs]), math.prod(shape[theirs.inputs :])
    matrix = (columns,) if theirs.inputs == 0 else (columns, rows) if theirs.transposed else (rows, columns)
    return matrix if theirs.third is None else (*matrix[:-1], 3 * matrix[-1])


def stored_as(theirs: Theirs, shape: Shape) -> tuple[list[str], Shape]:
    """The names of their tensors for one of our parameters with this shape, one for each layer, and their shape."""
    if LAYERS not in theirs.name:
        return [theirs.name], their_shape(theirs, shape)
    return [theirs.name.format(layer) for layer in range(shape[0])], their_shape(theirs, shape[1:])


def ours(
    read: Callable[[tuple[slice, ...]], np.ndarray], theirs: Theirs, shape: Shape, part: tuple[slice, ...]
) -> np.ndarray:
    """A part of one layer's parameter, of which `read` reads no more than whole rows and columns of their tensor.

    Args:
      read: reads a slice of their tensor.
      theirs: what the tensor holds.
      shape: of the layer's whole parameter.
      part: a slice for each axis of that, with a start and a stop.
    """
    n = theirs.inputs
    groups = [(sizes, cut) for sizes, cut in ((shape[:n], part[:n]), (shape[n:], part[n:])) if sizes]
    flat = [_flat(sizes, cut) for sizes, cut in groups]
    if theirs.third is not None:  # of the columns, which come last
        skipped = theirs.third * math.prod(groups[-1][0])
        flat[-1] = slice(skipped + flat[-1].start, skipped + flat[-1].stop)
    found = read(tuple(reversed(flat))).T if theirs.transposed else read(tuple(flat))
    block = [(cut[0].stop - cut[0].start, *sizes[1:]) for sizes, cut in groups]
    return found.reshape(sum(block, ()))[tuple(s for _, cut in groups for s in (slice(None), *cut[1:]))]


def _flat(sizes: Shape, part: tuple[slice, ...]) -> slice:
    """The part of several axes as one slice of their product: as the first axis says, and all of the others."""
    rest = math.prod(sizes[1:])
    return slice(part[0].start * rest, part[0].stop * rest)


def their_part(theirs: Theirs, array: np.ndarray) -> np.ndarray:
    """One layer's whole parameter as their tensor, or as the third of it that it is."""
    shape = their_shape(theirs._replace(third=None), array.shape)
    return array.reshape(shape[::-1]).T if theirs.transposed else array.reshape(shape)
