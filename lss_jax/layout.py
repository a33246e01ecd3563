"""Token order: which natural (global) positions each device of a sequence group holds.

A global array of the sequence is in *layout order*: the devices' segments one after the other. Under `contiguous` (the
paper's) that is the natural order. Under `zigzag` the sequence is cut into `2N` chunks and device `i` holds chunks `i`
and `2N-1-i`, an early and a late one, so that a causal mask gives every device the same work.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

CHUNKS_PER_DEVICE = {"contiguous": 1, "zigzag": 2}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `devices` (N) devices share a sequence; `name` is one of `CHUNKS_PER_DEVICE`."""

    name: str
    devices: int

    @property
    def chunks_per_device(self) -> int:
        """Runs of consecutive tokens on each device."""
        return CHUNKS_PER_DEVICE[self.name]

    @property
    def chunks_NC(self) -> np.ndarray:
        """Which of the natural chunks each device holds, in its order, `[N, chunks_per_device]`."""
        first = np.arange(self.devices)
        return np.stack((first, 2 * self.devices - 1 - first) if self.name == "zigzag" else (first,), axis=1)

    def padded(self, length: int) -> int:
        """The shortest length, at least `length`, that cuts into equal chunks."""
        chunks = self.devices * self.chunks_per_device
        return -(-length // chunks) * chunks

    def positions(self, length: int) -> np.ndarray:
        """The natural position of each place of a (padded) sequence in layout order, int32 `[length]`."""
        chunk = length // (self.devices * self.chunks_per_device)
        return (self.chunks_NC.reshape(-1, 1) * chunk + np.arange(chunk)).ravel().astype(np.int32)

    def natural(self, x: jax.Array, axis: int) -> jax.Array:
        """Segments stacked on axis 0 (`[N, ..., l, ...]`, `l` at `axis`) as one array in natural order.

        The result has `L` at `axis - 1`. Slices, a reversal and a concatenation: cheap to differentiate.
        """
        x = jnp.moveaxis(x, 0, axis - 1)  # [..., N, l, ...]
        if self.name == "contiguous":
            return _merge(x, axis - 1)
        early, late = jnp.split(x, 2, axis)
        return jnp.concatenate((_merge(early, axis - 1), _merge(jnp.flip(late, axis - 1), axis - 1)), axis - 1)

    def segments(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `natural`: the devices' segments of `x`, stacked on axis 0."""
        x = jnp.moveaxis(x, axis, 0)
        chunks = x.reshape(self.devices * self.chunks_per_device, -1, *x.shape[1:])
        if self.name == "zigzag":
            early, late = jnp.split(chunks, 2)
            chunks = jnp.stack((early, late[::-1]), axis=1)
        return jnp.moveaxis(chunks.reshape(self.devices, -1, *x.shape[1:]), 1, axis + 1)

    def from_natural(self, rows_l: jax.Array, axis: str) -> jax.Array:
        """Inside `shard_map` over `axis`: rows cut in natural order (leading axis) to those of this device's tokens.

        Under `zigzag` device `i` has the natural chunks `2i` and `2i + 1` at first. Of the even chunks every device
        needs one, and of the odd ones too: two sends.
        """
        if self.name == "contiguous":
            return rows_l
        even, odd = (
            jax.lax.ppermute(rows, axis, moves) for rows, moves in zip(jnp.split(rows_l, 2), self._moves, strict=True)
        )
        return jnp.concatenate(_swapped_on_odd_devices((even, odd), axis))

    def to_natural(self, rows_l: jax.Array, axis: str) -> jax.Array:
        """The inverse of `from_natural`."""
        if self.name == "contiguous":
            return rows_l
        even_and_odd = _swapped_on_odd_devices(jnp.split(rows_l, 2), axis)
        back = [[(there, here) for here, there in moves] for moves in self._moves]
        return jnp.concatenate(
            [jax.lax.ppermute(rows, axis, moves) for rows, moves in zip(even_and_odd, back, strict=True)]
        )

    @property
    def _moves(self) -> list[list[tuple[int, int]]]:
        """From where to where the even chunks go, and the odd ones, from natural order to zigzag."""
        holder_c = {chunk: device for device, chunks in enumerate(self.chunks_NC.tolist()) for chunk in chunks}
        return [[(device, holder_c[2 * device + odd]) for device in range(self.devices)] for odd in (0, 1)]


def _swapped_on_odd_devices(pair: Sequence[jax.Array], axis: str) -> tuple[jax.Array, jax.Array]:
    """Even and odd chunk to early and late, and back: on device `i` the early one is chunk `i`."""
    first, second = pair
    odd = jax.lax.axis_index(axis) % 2 == 1
    return jnp.where(odd, second, first), jnp.where(odd, first, second)


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """Axes `axis` and `axis + 1` as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
