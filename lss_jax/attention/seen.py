"""What each query sees, by the arguments of attention on global arrays: intervals of keys, checked."""

import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lss_jax.attention.mask import Intervals, first_keys, lifted, neighbours, prefix_causal
from lss_jax.attention.setting import Reach
from lss_jax.config.schema import ConfigError


def is_traced(tree: Any) -> bool:
    """Whether any value is known only when the program runs."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


class Seen(NamedTuple):
    """What each query sees, by the arguments of `dot_product_attention`."""

    is_causal: bool
    local_window_size: Any  # a number, a pair (left, right), or None
    prefix: int
    query_seq_lengths: Any  # for each row of the batch, or None
    key_value_seq_lengths: Any
    intervals: tuple[Any, Any] | None
    of_mask: Intervals | None  # what a mask array shows, if that is intervals

    @property
    def sides(self) -> tuple[int, ...] | None:
        """The window as (left, right), of whatever integers it was given."""
        size = self.local_window_size
        if size is None:
            return None
        return tuple(map(operator.index, (size, size) if np.ndim(size) == 0 else size))

    @property
    def reach(self) -> Reach | None:
        """How far a query sees, if its keys are of its own sequence; None without a window."""
        if self.sides is None:
            return None
        left, right = self.sides
        return Reach(left, 0 if self.is_causal and not self.prefix else right)

    def traced(self) -> Iterator[str]:
        """Arguments that are known only when the program runs, but for the intervals, which may be."""
        of_program = {name: getattr(self, name) for name in ("is_causal", "local_window_size", "prefix")}
        for name, value in of_program.items():
            if is_traced(value):
                yield (
                    f"{name} is traced, and decides what is compiled; give a Python value (static_argnames={name!r} of "
                    f"jax.jit), or intervals, which may be traced"
                )

    def problems(self) -> Iterator[str]:
        """What is wrong with the arguments, a line each; errors in the intervals are raised by `mask`."""
        if self.prefix < 0:
            yield f"prefix={self.prefix} must be at least 0"
        if self.prefix > 0 and not self.is_causal:
            yield f"prefix={self.prefix} has no use with is_causal=False, under which all is seen anyway; use prefix=0"
        try:
            wrong = self.sides is not None and (len(self.sides) != 2 or min(self.sides) < 0)
        except TypeError:  # no integers
            wrong = True
        if wrong:
            yield (
                f"local_window_size={self.local_window_size!r} must be one number or (left, right), each at least 0; "
                f"for a side without a bound, give the length of the sequence"
            )

    def mask(self, shape_BL: tuple[int, ...], keys: int) -> Intervals:
        """The keys that each query sees, of so many: `[L]`, or `[..., L]` if lengths or intervals differ between rows.

        Raises:
          ConfigError: lengths or intervals are not integers, or of another shape.
        """
        length = shape_BL[-1]
        position_L = jnp.arange(length, dtype=jnp.int32)
        mask = first_keys(position_L, length, keys)
        if self.is_causal:
            mask &= prefix_causal(position_L, self.prefix)
        if self.sides is not None:
            left, right = (min(side, max(length, keys)) for side in self.sides)
            mask &= neighbours(position_L, left, right)
        if self.query_seq_lengths is not None or self.key_value_seq_lengths is not None:
            queries_B1 = _lengths("query_seq_lengths", self.query_seq_lengths, shape_BL[:-1], length)
            keys_B1 = _lengths("key_value_seq_lengths", self.key_value_seq_lengths, shape_BL[:-1], keys)
            mask &= first_keys(lifted(position_L, len(shape_BL)), queries_B1, keys_B1)
        if self.of_mask is not None:
            mask &= self.of_mask
        return mask if self.intervals is None else mask & _intervals(self.intervals, shape_BL)


def _intervals(bounds: tuple[Any, Any], shape_BL: tuple[int, ...]) -> Intervals:
    """The user's intervals, `[L]` or `[..., L]`, checked and broadcast."""
    arrays = [jnp.asarray(bound) for bound in bounds]
    shapes = [array.shape for array in arrays]
    for name, array in zip(("start", "end"), arrays, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ConfigError(f"intervals: {name} is of dtype {array.dtype}; give positions as integers")
        if array.size > 1 and array.shape == shape_BL[-1:] == shape_BL[-2:-1]:
            raise ConfigError(
                f"intervals: {name} of shape {array.shape} could be of the {array.size} queries or of the {array.size} "
                f"rows of the batch; give [1, L] for queries, or [B, 1] for rows"
            )
    try:
        shared = all(array.shape[:-1] == (1,) * len(array.shape[:-1]) for array in arrays)
        whole = jnp.broadcast_shapes(*shapes, shape_BL)
    except ValueError:
        whole = ()
    if whole != shape_BL:
        raise ConfigError(
            f"intervals: start and end of shapes {shapes[0]} and {shapes[1]} do not broadcast to {shape_BL}, which the "
            f"queries have before their heads; give [L] for all rows, or [..., L]"
        )
    if shared:
        arrays, shape_BL = [array.reshape(array.shape[-1:]) for array in arrays], shape_BL[-1:]
    return Intervals(*(jnp.broadcast_to(array, shape_BL).astype(jnp.int32) for array in arrays))


def _lengths(name: str, lengths: Any, rows: tuple[int, ...], default: int) -> jax.Array:
    """The user's lengths of the rows of the batch, `[..., 1]`."""
    lengths = jnp.full(rows, default) if lengths is None else jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape not in (rows, (math.prod(rows),)):
        raise ConfigError(
            f"{name} of shape {lengths.shape} and dtype {lengths.dtype} must be one integer for each row of the batch, "
            f"which is of shape {rows or (1,)}"
        )
    return lengths.reshape(*rows, 1)
