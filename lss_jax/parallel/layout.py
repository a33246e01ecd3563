"""Token order: which natural (global) positions each device of a sequence group holds.

A global array of the sequence is in *layout order*: the devices' segments one after the other. Under `contiguous` (the
paper's) that is the natural order. Under `zigzag` the sequence is split into `2N` chunks and device `i` holds chunks
`i` and `2N-1-i`, an early and a late one, so that a causal mask gives every device the same work.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lss_jax.config.schema import Config
from lss_jax.parallel.mesh import MODEL, SEQ

CHUNKS_PER_DEVICE = {"contiguous": 1, "zigzag": 2}
SEQUENCE, SOURCE = "sequence", "source"  # what every model has, and what an encoder-decoder reads besides


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `devices` (N) devices share a sequence; `name` is one of `CHUNKS_PER_DEVICE`.

    If they are groups of `parts` (M) devices each, these share their segment in its order, in equal parts.
    """

    name: str
    devices: int
    parts: int = 1

    @property
    def chunks_per_device(self) -> int:
        """Runs of consecutive tokens on each device."""
        return CHUNKS_PER_DEVICE[self.name]

    @property
    def chunks_NC(self) -> np.ndarray:
        """Which of the natural chunks each device holds, in its order, `[N, chunks_per_device]`."""
        first = np.arange(self.devices)
        return np.stack((first, 2 * self.devices - 1 - first) if self.name == "zigzag" else (first,), axis=1)

    def chunk_at(self, device: Any, nth: Any) -> Any:
        """The natural chunk that is the `nth` of a device's chunks: `chunks_NC` by arithmetic, for traced numbers."""
        return device if self.name == "contiguous" else jnp.where(nth == 0, device, 2 * self.devices - 1 - device)

    def place_of(self, chunk: Any) -> tuple[Any, Any]:
        """The inverse: the device that holds a natural chunk, and which of its chunks it is."""
        if self.name == "contiguous":
            return chunk, 0 * chunk
        late = chunk >= self.devices
        return jnp.where(late, 2 * self.devices - 1 - chunk, chunk), late.astype(jnp.int32)

    @property
    def pieces_D2(self) -> np.ndarray:
        """Under `zigzag`, with each device's tokens split in two: which of the `2D` natural pieces it holds, `D = NM`.

        Always an even and an odd one. Within a chunk they are neighbours; and where a device has the last piece of its
        early chunk `i` and the first of its late one, `(i + 1) M - 1` and `(2N - 1 - i) M`, `M` is odd.
        """
        return (self.chunks_NC[..., None] * self.parts + np.arange(self.parts)).reshape(-1, 2)

    def padded(self, length: int) -> int:
        """The shortest length, at least `length`, that splits into equal chunks, and these into equal parts."""
        pieces = self.devices * self.chunks_per_device * self.parts
        return -(-length // pieces) * pieces

    def positions(self, length: int) -> np.ndarray:
        """The natural position of each token of a (padded) sequence in layout order, int32 `[length]`."""
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

    def from_natural(self, x_p: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Inside `shard_map` over `axes`: what belongs to tokens (leading axis), from natural order to layout order.

        Split in two pieces each, the devices have the natural pieces `2j` and `2j + 1` at first. Of the even pieces
        every device needs one, and of the odd ones too: two sends, or on two devices one, for the even ones are there.
        """
        if not self._moves_tokens:
            return x_p
        pieces = zip(jnp.split(x_p, 2), self._moves, strict=True)
        even_and_odd = [_sent(piece, axes, moves) for piece, moves in pieces]
        return jnp.concatenate(self._swapped_where_odd_first(even_and_odd, axes))

    def to_natural(self, x_p: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """The inverse of `from_natural`."""
        if not self._moves_tokens:
            return x_p
        even_and_odd = self._swapped_where_odd_first(jnp.split(x_p, 2), axes)
        back = [[(there, here) for here, there in moves] for moves in self._moves]
        pieces = zip(even_and_odd, back, strict=True)
        return jnp.concatenate([_sent(piece, axes, moves) for piece, moves in pieces])

    @property
    def sends(self) -> int:
        """How many collectives `from_natural` takes, and `to_natural` as many."""
        return sum(map(leave, self._moves)) if self._moves_tokens else 0

    @property
    def _moves_tokens(self) -> bool:
        return self.name == "zigzag" and self.devices > 1

    @property
    def _moves(self) -> list[list[tuple[int, int]]]:
        """From where to where the even pieces go, and the odd ones, from natural order to zigzag."""
        holder = {piece: device for device, pair in enumerate(self.pieces_D2.tolist()) for piece in pair}
        return [[(device, holder[2 * device + odd]) for device in range(len(holder) // 2)] for odd in (0, 1)]

    def _swapped_where_odd_first(self, pair: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
        """The even and the odd piece in the order in which the device holds them; and the inverse, by the same swap."""
        first, second = pair
        odd_first = jnp.asarray(self.pieces_D2[:, 0] % 2 == 1)[jax.lax.axis_index(axes)]
        return [jnp.where(odd_first, second, first), jnp.where(odd_first, first, second)]


def leave(moves: list[tuple[int, int]]) -> bool:
    """Whether any piece goes to another device."""
    return any(here != there for here, there in moves)


def _sent(piece: jax.Array, axes: tuple[str, ...], moves: list[tuple[int, int]]) -> jax.Array:
    return jax.lax.ppermute(piece, axes, moves) if leave(moves) else piece


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """Axes `axis` and `axis + 1` as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def layout_on(config: Config, mesh: Mesh | AbstractMesh, sequence: str = SEQUENCE) -> Layout:
    """The token order of a config's sequence, or of its source, on this mesh."""
    names = {SEQUENCE: config.attention.layout, SOURCE: config.attention.source_layout}
    return Layout(names[sequence], mesh.shape[SEQ], mesh.shape[MODEL])


def length_of(config: Config, sequence: str = SEQUENCE) -> int:
    """The tokens of a config's sequence, or of its source, without padding."""
    return {SEQUENCE: config.data.seq_len, SOURCE: config.data.source_len}[sequence]


def padded_length(config: Config, mesh: Mesh | AbstractMesh, sequence: str = SEQUENCE) -> int:
    """The same with the padding by which this mesh shards it."""
    return layout_on(config, mesh, sequence).padded(length_of(config, sequence))
