"""Mask and bias as users give them: arrays that broadcast to `[..., H, L, S]`, and masks that are intervals."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from lss_jax.attention.kernels import TARGETS
from lss_jax.attention.mask import Intervals
from lss_jax.attention.pairs import Pairs
from lss_jax.attention.seen import is_traced


def pair_problems(mask: Any, bias: Any, kernel: str, shape: tuple[int, ...], keys: int) -> Iterator[str]:
    """Dtypes that are none of a mask or of a bias, shapes that do not broadcast, and kernels that read neither.

    The queries are of this shape, `[..., L, H, K]`, and there are so many keys.
    """
    if mask is not None and mask.dtype != bool:
        yield f"mask is of dtype {mask.dtype}; give booleans, or numbers that are added to the scores as bias"
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        yield f"bias is of dtype {bias.dtype}; give floating-point numbers, or booleans as mask"
    if kernel in TARGETS and not (mask is None and bias is None):
        yield f"kernel={kernel!r} reads no mask array and no bias; use kernel='auto', which is 'blockwise' then"
    whole = _scores_shape(shape, keys)
    for name, array in (("mask", mask), ("bias", bias)):
        if array is not None and not _broadcasts(array.shape, whole):
            yield (
                f"{name} of shape {array.shape} does not broadcast to {whole}: rows, query heads, queries, keys, each "
                f"as large or 1"
            )


def as_pairs(mask: Any, bias: Any, shape: tuple[int, ...], keys: int) -> tuple[Pairs | None, Intervals | None]:
    """Both as the kernels read them, without the mask if it is intervals: and these, if it is."""
    mask, bias = (None if x is None else in_four_axes(x, shape, keys) for x in (mask, bias))
    intervals = None if mask is None else as_intervals(mask, shape, keys)
    mask = mask if intervals is None else None
    return (None if mask is None and bias is None else Pairs(mask, bias)), intervals


def in_four_axes(array: Any, shape: tuple[int, ...], keys: int) -> Any:
    """The array as `[rows, heads, queries, keys]`, where axes of size 1 stay as they are."""
    whole = _scores_shape(shape, keys)
    array = array.reshape((1,) * (len(whole) - array.ndim) + array.shape)
    *rows, heads, queries, _ = array.shape
    if math.prod(rows) > 1 and tuple(rows) != whole[:-3]:
        array = jnp.broadcast_to(array, (*whole[:-3], *array.shape[-3:]))
    return array.reshape(-1, heads, queries, array.shape[-1])


def as_intervals(mask_BHLS: Any, shape: tuple[int, ...], keys: int) -> Intervals | None:
    """The same mask as one interval of keys per query, `[L]` or `[..., L]`: None if it is none, or traced.

    An array on devices is looked at where it is; only whether all rows are intervals comes to the host.
    """
    if is_traced(mask_BHLS) or (AxisType.Explicit in jax.typeof(mask_BHLS).sharding.mesh.axis_types):
        return None
    numbers = np if isinstance(mask_BHLS, np.ndarray) else jnp
    with jax.ensure_compile_time_eval():
        mask_BLS, size = mask_BHLS[:, 0], mask_BHLS.shape[-1]
        count_BL, first_BL = mask_BLS.sum(-1), mask_BLS.argmax(-1)
        end_BL = size - mask_BLS[..., ::-1].argmax(-1)
        exact_BL = (end_BL - first_BL == count_BL) | (count_BL == 0)
        if not (bool(exact_BL.all()) and bool((mask_BHLS == mask_BHLS[:, :1]).all())):
            return None
        ends_BL = numbers.where(count_BL > 0, keys if size == 1 else end_BL, 0)
        rows = () if len(mask_BLS) == 1 else shape[:-3]
        return Intervals(*(_per_query(bound_BL, (*rows, shape[-3])) for bound_BL in (first_BL, ends_BL)))


def _per_query(bound_BL: Any, shape: tuple[int, ...]) -> jax.Array:
    bound = bound_BL.reshape(*shape[:-1], -1) if len(shape) > 1 else bound_BL.reshape(-1)
    return jnp.broadcast_to(jnp.asarray(bound, jnp.int32), shape)


def _broadcasts(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    shape = (1,) * (len(whole) - len(shape)) + shape
    return len(shape) == len(whole) and all(size in (1, full) for size, full in zip(shape, whole, strict=True))


def _scores_shape(shape: tuple[int, ...], keys: int) -> tuple[int, ...]:
    """The shape of the scores of such queries; as in JAX, with one row where the queries have no axis for rows."""
    *rows, length, heads, _ = shape
    return (*(rows or (1,)), heads, length, keys)
