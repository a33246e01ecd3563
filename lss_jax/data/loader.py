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

Read = Callable[[Window, range, int], np.ndarray]  # tokens and targets `[2, run]` of a run of positions; and its row


def read_batch(
    windows: Sequence[Window],
    seq_len: int,
    mesh: Mesh,
    layout: Layout,
    *,
    read: Read,
    token_bytes: np.ndarray | None = None,
) -> Batch:
    """The global batch of some windows, sharded over the mesh; `read` says what their tokens and targets are.

    Beyond the end of a stream or a window, and in the padding to a length that the mesh divides, tokens are 0 and
    targets ignored. If the streams have documents, so have the windows. With the `token_bytes` of each token of the
    vocabulary the batch has those of its targets.
    """
    packed = windows[0].stream.documents is not None
    like = batch_like(len(windows), seq_len, mesh, layout, packed, token_bytes is not None)
    (B, L), position_L = like.tokens.shape, layout.positions(like.tokens.shape[1])

    @functools.cache  # tokens and targets share one read; so do devices that hold the same segment
    def segment(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        runs = _runs(position_L[left:right])
        rows = [[read(windows[row], run, row) for run in runs] for row in range(*slice(top, bottom).indices(B))]
        return np.concatenate(list(map(np.stack, zip(*rows, strict=True))), axis=2)

    def tokens_or_targets(which: int, index: Any) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (p.indices(n) for p, n in zip(index, (B, L), strict=True))
        return segment(top, bottom, left, right)[:, which]

    def document_bounds(index: Any) -> np.ndarray:
        _, rows, columns = index
        bounds = [_bounds(window, position_L[columns]) for window in windows[rows]]
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
    return np.pad(found.astype(np.int32), (0, length - len(found)), constant_values=value)


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
