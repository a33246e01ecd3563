"""The segment loader: every device's callback reads the bytes of its own segments, and no batch is ever whole.

A batch is a set of windows into one long array of bytes. Which windows is a function of (seed, step), so a run resumes
with the step alone and every mesh, and every number of processes, sees the same data.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.mesh import DATA, SEQ, shardings

T = TypeVar("T")
IGNORED = -1  # a target that does not count


class Batch(NamedTuple):
    """Global int32 arrays, or their specs, shardings or shapes.

    `targets_BL` holds the next byte of each token, across segment borders too.
    """

    tokens_BL: Any
    targets_BL: Any
    positions_L: Any


BATCH_SPECS = Batch(P(DATA, SEQ), P(DATA, SEQ), P(SEQ))


def shuffled_starts(step: int, *, windows: int, batch_size: int, seq_len: int, seed: int) -> np.ndarray:
    """Where the windows of training step `step` start, `[B]`: each epoch is a fresh permutation of all windows."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), windows)
    return np.array([_permutation(seed, int(e), windows)[i] for e, i in zip(epochs, places, strict=True)]) * seq_len


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def training_windows(length: int, seq_len: int) -> int:
    """How many whole windows, each with its last target, `length` bytes hold."""
    return (length - 1) // seq_len


def consecutive_starts(length: int, *, batch_size: int, seq_len: int) -> list[np.ndarray]:
    """Starts of all batches that together predict every byte but the first, each once; the rest is padding."""
    batches = -(-(length - 1) // (batch_size * seq_len))
    return list(np.arange(batches * batch_size).reshape(batches, batch_size) * seq_len)


def read_batch(data: np.ndarray, starts_B: np.ndarray, seq_len: int, mesh: Mesh) -> Batch:
    """The windows of `data` (bytes, memory-mapped) at `starts_B`, cut over the mesh.

    What lies beyond the end of `data` is token 0 with an ignored target.
    """
    shape = (len(starts_B), seq_len)
    placed = shardings(BATCH_SPECS, mesh)

    @functools.cache  # tokens and targets share one read; so do devices that hold the same segment
    def segment(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return np.stack([_read(data, start + left, start + right + 1) for start in starts_B[top:bottom]])

    def array(offset: int, sharding: jax.sharding.Sharding) -> jax.Array:
        def callback(index: Any) -> np.ndarray:  # a tuple of slices
            (top, bottom, _), (left, right, _) = (part.indices(size) for part, size in zip(index, shape, strict=True))
            values = segment(top, bottom, left, right)[:, offset : offset + right - left]
            return values if offset else np.maximum(values, 0)

        return jax.make_array_from_callback(shape, sharding, callback)

    def positions(index: Any) -> np.ndarray:
        return np.arange(*index[0].indices(seq_len), dtype=np.int32)

    positions_L = jax.make_array_from_callback((seq_len,), placed.positions_L, positions)
    return Batch(array(0, placed.tokens_BL), array(1, placed.targets_BL), positions_L)


def batch_like(batch_size: int, seq_len: int, mesh: Mesh) -> Batch:
    """Shapes and shardings of a batch, to compile a step before there is data."""
    placed = shardings(BATCH_SPECS, mesh)
    tokens_BL = jax.ShapeDtypeStruct((batch_size, seq_len), np.int32, sharding=placed.tokens_BL)
    positions_L = jax.ShapeDtypeStruct((seq_len,), np.int32, sharding=placed.positions_L)
    return Batch(tokens_BL, tokens_BL, positions_L)


def _read(data: np.ndarray, start: int, stop: int) -> np.ndarray:
    found = data[start:stop].astype(np.int32)
    return np.pad(found, (0, stop - start - len(found)), constant_values=IGNORED)


def prefetched(make: Callable[[int], T], first: int, stop: int, depth: int = 2) -> Generator[T, None, None]:
    """`make(first)` to `make(stop - 1)` in order, up to `depth` of them made ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            pending = deque(pool.submit(make, index) for index in range(first, min(first + depth, stop)))
            for index in range(first, stop):
                yield pending.popleft().result()
                if index + depth < stop:
                    pending.append(pool.submit(make, index + depth))
        finally:
            pool.shutdown(cancel_futures=True)
