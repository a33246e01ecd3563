"""The segment loader: each device's callback reads the tokens of its own segments, and no process reads a whole batch.

A batch is a set of windows into long streams of tokens. Which windows is a function of (seed, step), so a run resumes
with the step alone and every mesh, and every number of processes, sees the same data.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from lss_jax.data.batch import IGNORED, Batch, batch_like
from lss_jax.data.packing import IGNORED_LABEL
from lss_jax.data.windows import Window
from lss_jax.parallel.layout import Layout

T = TypeVar("T")

# Tokens and targets `[2, run]`, or `[2, run, P]` of patches, of a run of positions in a window with this row.
Read = Callable[[Window, range, int], np.ndarray]


def read_batch(
    windows: Sequence[Window],
    seq_len: int,
    mesh: Mesh,
    layout: Layout,
    *,
    read: Read,
    token_bytes: np.ndarray | None = None,
    patch_pixels: int = 0,
    documents: bool = True,
) -> Batch:
    """The global batch of some windows, sharded over the mesh; `read` says what their tokens and targets are.

    Beyond the end of a stream or a window, and in the padding to a length that the mesh divides, tokens are 0 and
    targets ignored. If the streams have documents, so has the batch, unless `documents` is false. With the
    `token_bytes` of each token of the vocabulary the batch has those of its targets. If tokens are patches of images,
    they have so many `patch_pixels`.
    """
    packed = documents and windows[0].stream.documents is not None
    has: dict[str, Any] = {"packed": packed, "encoded": token_bytes is not None, "patch_pixels": patch_pixels}
    like = batch_like(len(windows), seq_len, mesh, layout, **has)
    position_L = layout.positions(like.tokens.shape[-1])
    reader = Reader(windows, position_L, read)

    def document_bounds(index: Any) -> np.ndarray:
        _, rows, columns = index
        bounds = [_bounds(window, position_L[columns]) for window in windows[rows]]
        return np.stack(bounds, axis=1)[index[0]]

    def target_bytes(index: Any) -> np.ndarray:
        assert token_bytes is not None
        targets = reader.targets(index)
        return np.where(targets == IGNORED, 0, token_bytes[np.maximum(targets, 0)]).astype(np.int32)

    def array(shape: Any, callback: Callable[[Any], np.ndarray]) -> jax.Array | None:
        return shape and jax.make_array_from_callback(shape.shape, shape.sharding, callback)

    return Batch(
        tokens=array(like.tokens, reader.tokens),
        targets=array(like.targets, reader.targets),
        positions=array(like.positions, lambda index: position_L[index]),
        rows=array(like.rows, lambda index: np.arange(len(windows), dtype=np.int32)[index]),
        documents=array(like.documents, document_bounds),
        target_bytes=array(like.target_bytes, target_bytes),
    )


class Reader:
    """Reads what callbacks ask for of the tokens and targets of windows, `[B, L]`, at the positions `position_L`.

    Of patches of images they are `[P, B, L]`.
    """

    def __init__(self, windows: Sequence[Window], position_L: np.ndarray, read: Read):
        self._windows, self._position_L, self._read = windows, position_L, read
        self._segment = functools.cache(self._read_segment)  # for tokens and targets, and all devices that have it

    def tokens(self, index: Any) -> np.ndarray:
        """The tokens at an index of the global array."""
        return self._at(index, 0)

    def targets(self, index: Any) -> np.ndarray:
        """The targets at an index of the global array."""
        return self._at(index, 1)

    def _at(self, index: Any, which: int) -> np.ndarray:
        shape = len(self._windows), len(self._position_L)
        (top, bottom, _), (left, right, _) = (part.indices(size) for part, size in zip(index[-2:], shape, strict=True))
        found = self._segment(top, bottom, left, right)[:, which]
        return np.moveaxis(found, 2, 0) if found.ndim == 3 else found  # of patches the pixels come first

    def _read_segment(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        runs = _runs(self._position_L[left:right])
        rows = [[self._read(self._windows[row], run, row) for run in runs] for row in range(top, bottom)]
        return np.concatenate(list(map(np.stack, zip(*rows, strict=True))), axis=2)


def _runs(positions: np.ndarray) -> list[range]:
    """Splits positions into runs of consecutive ones."""
    parts = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def next_tokens(window: Window, run: range, _row: int) -> np.ndarray:
    """Tokens and, as targets, the next ones; of documents those that are learned."""
    (data, documents, _), start = window.stream, window.start
    stop = min(run.stop, window.stop - start)
    found = data[start + run.start : start + stop + 1].astype(np.int32) if run.start < stop else np.zeros(0, np.int32)
    tokens, targets = np.zeros(len(run), np.int32), np.full(len(run), IGNORED, np.int32)
    count = min(len(found), max(stop - run.start, 0))
    tokens[:count] = found[:count]
    targets[: max(len(found) - 1, 0)] = found[1:]
    if documents is not None:
        targets[~documents.are_targets(start + 1 + np.arange(run.start, run.stop))] = IGNORED
    return np.stack((tokens, targets))


def own_tokens(window: Window, run: range, _row: int) -> np.ndarray:
    """Tokens and, as targets, the same."""
    found = window.stream.tokens[_offsets(window, run)]
    return np.stack((_filled(found, len(run), 0), _filled(found, len(run), IGNORED)))


def without_target(read: Read, token: int) -> Read:
    """Tokens and targets as `read` gives them, but with this token never a target."""

    def found(window: Window, run: range, row: int) -> np.ndarray:
        tokens, targets = read(window, run, row)
        return np.stack((tokens, np.where(targets == token, IGNORED, targets)))

    return found


def labelled(window: Window, run: range, _row: int) -> np.ndarray:
    """Tokens and, as targets, their labels."""
    tokens, _, labels = window.stream
    assert labels is not None, "the task is for sources with labels"
    found = labels[_offsets(window, run)].astype(np.int32)
    found = np.where(found == IGNORED_LABEL, IGNORED, found)
    return np.stack((_filled(tokens[_offsets(window, run)], len(run), 0), _filled(found, len(run), IGNORED)))


def _offsets(window: Window, run: range) -> slice:
    """The offsets in the stream of a run of positions, as far as the window has them."""
    return slice(window.start + run.start, max(window.start + run.start, min(window.start + run.stop, window.stop)))


def _filled(found: np.ndarray, length: int, value: int) -> np.ndarray:
    """What was found, int32, filled up to this length."""
    behind = [(0, length - len(found)), *[(0, 0)] * (found.ndim - 1)]
    return np.pad(found.astype(np.int32), behind, constant_values=value)


def _bounds(window: Window, position_l: np.ndarray) -> np.ndarray:
    """Start and end in the window, `[2, l]`, of each position's document; (0, 0), which is empty, for padding."""
    documents, length = window.stream.documents, min(window.stop, len(window.stream.tokens)) - window.start
    assert documents is not None, "all streams of a batch have documents, or none has"
    bounds_2l = documents.bounds(window.start + position_l.astype(np.int64)) - window.start
    return np.where(position_l < length, np.clip(bounds_2l, 0, max(length, 0)), 0).astype(np.int32)


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
