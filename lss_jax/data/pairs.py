"""Batches of pairs: a source and a target each, a document's prompt and its answer.

As of windows, each device's callback reads the tokens of its own segments, here of two sequences.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import Config
from lss_jax.data.batch import IGNORED
from lss_jax.data.loader import Read, Reader
from lss_jax.data.packing import Stream
from lss_jax.data.windows import Window
from lss_jax.parallel.layout import SEQUENCE, SOURCE, layout_on, padded_length
from lss_jax.parallel.mesh import DATA, SEQ, shardings


class PairBatch(NamedTuple):
    """The arrays of a batch of pairs, all int32; or, in the same fields, their specs, shardings or shapes.

    Shapes are global, with `S` and `L` padded and each in its own layout order.
    """

    source: Any  # [B, S]
    tokens: Any  # [B, L], a start token and then the target without its last token
    targets: Any  # [B, L], the target; or `IGNORED`
    positions: Any  # [L], natural
    source_positions: Any  # [S], natural
    lengths: Any  # [2, B], of each row's source and target, without padding
    rows: Any  # [B], the number of each pair in the global batch


PAIR_SPECS = PairBatch(P(DATA, SEQ), P(DATA, SEQ), P(DATA, SEQ), P(SEQ), P(SEQ), P(None, DATA), P(DATA))


def pairs_like(config: Config, mesh: Mesh | AbstractMesh) -> PairBatch:
    """Global shapes and shardings of a batch of pairs."""
    B, S, L = config.data.batch_size, *(padded_length(config, mesh, sequence) for sequence in (SOURCE, SEQUENCE))
    shapes = PairBatch((B, S), (B, L), (B, L), (L,), (S,), (2, B), (B,))
    placed = shardings(PAIR_SPECS, mesh)
    return PairBatch(*(jax.ShapeDtypeStruct(s, np.int32, sharding=p) for s, p in zip(shapes, placed, strict=True)))


class PairWindows:
    """A window for each document of a stream, whole: a prompt and its answer."""

    def __init__(self, stream: Stream):
        assert stream.documents is not None, "pairs come in documents"
        self.stream, self._documents = stream, stream.documents
        self.training = self.evaluation = len(stream.documents)

    def __getitem__(self, number: int) -> Window:
        end = len(self.stream.tokens)
        return Window(self.stream, *(self._documents[number] if number < self.evaluation else (end, end)))

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each prompt and of each answer, `[2, D]`."""
        return self._documents.lengths()


def sides(window: Window, config: Config) -> tuple[Window, Window]:
    """The prompt and the answer of a document, each without what is too long for its side."""
    (stream, start, stop), data = window, config.data
    assert stream.documents is not None, "pairs come in documents"
    first = stream.documents.first_target(stream.documents.number(start)) if start < stop else stop
    source = Window(stream, start, min(first, start + data.source_len))
    return source, Window(stream, first, min(stop, first + data.seq_len))


def read_pairs(windows: Sequence[Window], config: Config, mesh: Mesh, *, read: Read, start_token: int) -> PairBatch:
    """The global batch of some documents, sharded over the mesh; `read` says what the tokens of sources are.

    Tokens of padding are 0, and its targets ignored.
    """
    like = pairs_like(config, mesh)
    sources, targets = zip(*(sides(window, config) for window in windows), strict=True)
    lengths_2B = np.array([[stop - start for _, start, stop in side] for side in (sources, targets)], np.int32)

    def behind_start(window: Window, run: range, _row: int) -> np.ndarray:
        return _behind_start(window, run, start_token)

    position_S, position_L = (
        layout_on(config, mesh, sequence).positions(padded_length(config, mesh, sequence))
        for sequence in (SOURCE, SEQUENCE)
    )
    of_source, of_target = Reader(sources, position_S, read), Reader(targets, position_L, behind_start)
    callbacks = PairBatch(
        source=of_source.tokens,
        tokens=of_target.tokens,
        targets=of_target.targets,
        positions=lambda index: position_L[index],
        source_positions=lambda index: position_S[index],
        lengths=lambda index: lengths_2B[index],
        rows=lambda index: np.arange(len(windows), dtype=np.int32)[index],
    )
    arrays = (jax.make_array_from_callback(s.shape, s.sharding, c) for s, c in zip(like, callbacks, strict=True))
    return PairBatch(*arrays)


def _behind_start(window: Window, run: range, start_token: int) -> np.ndarray:
    """A window's tokens as targets, and as tokens the ones before them; before the first is the start token."""
    tokens, targets = np.zeros(len(run), np.int32), np.full(len(run), IGNORED, np.int32)
    before, stop = max(run.start - 1, 0), min(run.stop, window.stop - window.start)
    if run.start < stop:
        found = window.stream.tokens[window.start + before : window.start + stop].astype(np.int32)
        count = stop - run.start
        targets[:count] = found[run.start - before :]
        tokens[:count] = found[:count] if run.start else [start_token, *found[:-1]]
    return np.stack((tokens, targets))
