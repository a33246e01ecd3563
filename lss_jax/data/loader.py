"""The segment loader: each device's callback reads the tokens of its own segments, and no process reads a whole batch.

A batch is a set of windows into long streams of tokens. Which windows is a function of (seed, step), so a run resumes
with the step alone and every mesh, and every number of processes, sees the same data.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from lss_jax.data.batch import IGNORED, Batch, batch_like
from lss_jax.data.packing import Packing, Stream, Tokens
from lss_jax.parallel.layout import Layout

T = TypeVar("T")


class Window(NamedTuple):
    """A row of a batch: a window into a stream, from the offset `start` on."""

    stream: Stream
    start: int


def windows_at(tokens: Tokens, starts_B: np.ndarray, documents: Packing | None = None) -> list[Window]:
    """The windows of one stream at `starts_B`."""
    return [Window(Stream(tokens, documents), int(start)) for start in starts_B]


def read_batch(
    windows: Sequence[Window],
    seq_len: int,
    mesh: Mesh,
    layout: Layout,
    token_bytes: np.ndarray | None = None,
) -> Batch:
    """The global batch of some windows, sharded over the mesh.

    Beyond the end of a stream, and in the padding to a length that the mesh divides, tokens are 0 and targets ignored.
    If the streams have documents, so have the windows, and what does not count in them is no target. With the
    `token_bytes` of each token of the vocabulary the batch has those of its targets.
    """
    packed = windows[0].stream.documents is not None
    like = batch_like(len(windows), seq_len, mesh, layout, packed, token_bytes is not None)
    position_L = layout.positions(like.tokens.shape[1])

    @functools.cache  # tokens and targets share one read; so do devices that hold the same segment
    def segment(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        runs = runs_of(position_L[left:right])
        rows = [[_read(window, run, seq_len) for run in runs] for window in windows[top:bottom]]
        return np.concatenate(list(map(np.stack, zip(*rows, strict=True))), axis=2)

    def tokens_or_targets(which: int, index: Any) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (p.indices(n) for p, n in zip(index, like.tokens.shape, strict=True))
        return segment(top, bottom, left, right)[:, which]

    def document_bounds(index: Any) -> np.ndarray:
        _, rows, columns = index
        bounds = [_bounds(window, position_L[columns], seq_len) for window in windows[rows]]
        return np.stack(bounds, axis=1)[index[0]]

    def target_bytes(index: Any) -> np.ndarray:
        assert token_bytes is not None
        targets = tokens_or_targets(1, index)
        return np.where(targets == IGNORED, 0, token_bytes[np.maximum(targets, 0)]).astype(np.int32)

    def array(shape: Any, callback: Callable[[Any], np.ndarray]) -> jax.Array | None:
        return shape and jax.make_array_from_callback(shape.shape, shape.sharding, callback)

    return Batch(
        tokens=array(like.tokens, functools.partial(tokens_or_targets, 0)),
        targets=array(like.targets, functools.partial(tokens_or_targets, 1)),
        positions=array(like.positions, lambda index: position_L[index]),
        rows=array(like.rows, lambda index: np.arange(len(windows), dtype=np.int32)[index]),
        documents=array(like.documents, document_bounds),
        target_bytes=array(like.target_bytes, target_bytes),
    )


def runs_of(positions: np.ndarray) -> list[range]:
    """Splits positions into runs of consecutive ones."""
    parts = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def _read(window: Window, run: range, seq_len: int) -> np.ndarray:
    """Tokens and targets, `[2, run]`, of a run of positions in a window."""
    (data, documents), start = window.stream, window.start
    stop = min(run.stop, seq_len)
    found = data[start + run.start : start + stop + 1].astype(np.int32) if run.start < stop else np.zeros(0, np.int32)
    tokens, targets = np.zeros(len(run), np.int32), np.full(len(run), IGNORED, np.int32)
    count = min(len(found), max(stop - run.start, 0))
    tokens[:count] = found[:count]
    targets[: max(len(found) - 1, 0)] = found[1:]
    if documents is not None:
        targets[~documents.are_targets(start + 1 + np.arange(run.start, run.stop))] = IGNORED
    return np.stack((tokens, targets))


def _bounds(window: Window, position_l: np.ndarray, seq_len: int) -> np.ndarray:
    """Start and end in the window, `[2, l]`, of each position's document; (0, 0), which is empty, for padding."""
    documents = window.stream.documents
    assert documents is not None, "all streams of a batch have documents, or none has"
    bounds_2l = documents.bounds(window.start + position_l.astype(np.int64)) - window.start
    return np.where(position_l < seq_len, np.clip(bounds_2l, 0, seq_len), 0).astype(np.int32)


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
