"""The segment loader: each device's callback reads the bytes of its own segments, and no process reads a whole batch.

A batch is a set of windows into one long array of bytes. Which windows is a function of (seed, step), so a run resumes
with the step alone and every mesh, and every number of processes, sees the same data.
"""

import functools
import re
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from lss_jax.config.schema import ConfigError
from lss_jax.data.batch import IGNORED, Batch, batch_like
from lss_jax.parallel.layout import Layout

T = TypeVar("T")


class Bytes(Protocol):
    """A long array of bytes (uint8) of which slices are read: a NumPy array, or a part of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


def shuffled_starts(step: int, *, windows: int, batch_size: int, seq_len: int, seed: int) -> np.ndarray:
    """The starts of the windows of training step `step`, `[B]`: each epoch is a fresh permutation of all windows."""
    epochs, indices = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), windows)
    return np.array([_permutation(seed, int(e), windows)[i] for e, i in zip(epochs, indices, strict=True)]) * seq_len


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def training_windows(length: int, seq_len: int) -> int:
    """The number of whole windows, each with its last target, in `length` bytes."""
    return (length - 1) // seq_len


def consecutive_starts(length: int, *, batch_size: int, seq_len: int) -> list[np.ndarray]:
    """The starts of each batch's windows, `[B]`; together they predict every byte but the first once, then padding."""
    batches = -(-(length - 1) // (batch_size * seq_len))
    return list(np.arange(batches * batch_size).reshape(batches, batch_size) * seq_len)


def read_batch(
    data: Bytes,
    starts_B: np.ndarray,
    seq_len: int,
    mesh: Mesh,
    layout: Layout,
    documents: np.ndarray | None = None,
) -> Batch:
    """The global batch of the windows of `data` at `starts_B`, sharded over the mesh.

    Beyond the end of `data`, and in the padding to a length that the mesh divides, tokens are 0 and targets ignored.
    With `documents` (from `document_edges`) the first token of a document is no target.
    """
    like = batch_like(len(starts_B), seq_len, mesh, layout, packed=documents is not None)
    position_L = layout.positions(like.tokens.shape[1])

    @functools.cache  # tokens and targets share one read; so do devices that hold the same segment
    def segment(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        runs = _runs(position_L[left:right])
        rows = [[_read(data, start, run, seq_len, documents) for run in runs] for start in starts_B[top:bottom]]
        return np.concatenate(list(map(np.stack, zip(*rows, strict=True))), axis=2)

    def tokens_or_targets(which: int, index: Any) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (p.indices(n) for p, n in zip(index, like.tokens.shape, strict=True))
        return segment(top, bottom, left, right)[:, which]

    def document_bounds(index: Any) -> np.ndarray:
        assert documents is not None
        _, rows, columns = index
        return _bounds(documents, starts_B[rows], position_L[columns], seq_len)[index[0]]

    def array(shape: Any, callback: Callable[[Any], np.ndarray]) -> jax.Array | None:
        return shape and jax.make_array_from_callback(shape.shape, shape.sharding, callback)

    return Batch(
        tokens=array(like.tokens, functools.partial(tokens_or_targets, 0)),
        targets=array(like.targets, functools.partial(tokens_or_targets, 1)),
        positions=array(like.positions, lambda index: position_L[index]),
        rows=array(like.rows, lambda index: np.arange(len(starts_B), dtype=np.int32)[index]),
        documents=array(like.documents, document_bounds),
    )


def document_edges(data: np.ndarray, separator: str) -> np.ndarray | None:
    """The starts of the documents of `data`, int64, and the largest int64 as the last edge; None without a separator.

    Each document ends with `separator`. Reads all of `data`, once.

    Raises:
      ConfigError: the separator does not occur.
    """
    if not separator:
        return None
    ends = np.fromiter((match.end() for match in re.finditer(re.escape(separator.encode()), data.data)), np.int64)
    if not len(ends):
        raise ConfigError(
            f"data.separator={separator!r} does not occur in a split of {len(data)} bytes; give a string that ends "
            f"documents (in a shell $'\\n\\n' is two line feeds), or leave it empty"
        )
    return np.concatenate(([0], ends, [np.iinfo(np.int64).max]))


def _runs(positions: np.ndarray) -> list[range]:
    """Splits positions into runs of consecutive ones."""
    parts = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def _read(data: Bytes, start: int, run: range, seq_len: int, documents: np.ndarray | None) -> np.ndarray:
    """Tokens and targets, `[2, run]`, of a run of positions in the window at `start`."""
    stop = min(run.stop, seq_len)
    found = data[start + run.start : start + stop + 1].astype(np.int32) if run.start < stop else np.zeros(0, np.int32)
    tokens, targets = np.zeros(len(run), np.int32), np.full(len(run), IGNORED, np.int32)
    count = min(len(found), max(stop - run.start, 0))
    tokens[:count] = found[:count]
    targets[: max(len(found) - 1, 0)] = found[1:]
    if documents is not None:
        firsts = documents[slice(*np.searchsorted(documents, (start + run.start + 1, start + run.stop + 1)))]
        targets[firsts - (start + run.start + 1)] = IGNORED
    return np.stack((tokens, targets))


def _bounds(edges: np.ndarray, starts_B: np.ndarray, position_l: np.ndarray, seq_len: int) -> np.ndarray:
    """Start and end in the window, `[2, B, l]`, of each position's document; (0, 0), which is empty, for padding."""
    offset_Bl = starts_B[:, None].astype(np.int64) + position_l
    number_Bl = np.searchsorted(edges, offset_Bl, side="right")
    bounds_2Bl = np.stack((edges[number_Bl - 1], edges[number_Bl])) - starts_B[:, None]
    bounds_2Bl = np.where(position_l < seq_len, np.clip(bounds_2Bl, 0, seq_len), 0)
    return bounds_2Bl.astype(np.int32)


def prefetched(make: Callable[[int], T], first: int, stop: int, depth: int = 2) -> Generator[T, None, None]:
    """Yields `make(first)` to `make(stop - 1)` in order; a thread makes up to `depth` of them ahead."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            pending = deque(pool.submit(make, index) for index in range(first, min(first + depth, stop)))
            for index in range(first, stop):
                yield pending.popleft().result()
                if index + depth < stop:
                    pending.append(pool.submit(make, index + depth))
        finally:
            pool.shutdown(cancel_futures=True)
