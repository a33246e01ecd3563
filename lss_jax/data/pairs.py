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
from lss_jax.data.windows import Window, sides
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


def truncated(window: Window, config: Config) -> tuple[Window, Window]:
    """The same, each without what is too long for its side."""
    source, target = sides(window)
    return source.truncated(config.data.source_len), target.truncated(config.data.seq_len)


def read_pairs(
    windows: Sequence[Window], config: Config, mesh: Mesh, *, read: Read, start_token: int, end_token: int | None
) -> PairBatch:
    """The global batch of some documents, sharded over the mesh; `read` says what the tokens of sources are.

    Answers that are not cut end with `end_token`, if it is given. Tokens of padding are 0, and its targets ignored.
    """
    like = pairs_like(config, mesh)
    sources, targets = zip(*(truncated(window, config) for window in windows), strict=True)
    ends_B = [end_token is not None and start < stop < start + config.data.seq_len for _, start, stop in targets]
    lengths_2B = np.array([[stop - start for _, start, stop in side] for side in (sources, targets)], np.int32)
    lengths_2B[1] += ends_B

    def behind_start(window: Window, run: range, row: int) -> np.ndarray:
        return _behind_start(window, run, start_token, end_token if ends_B[row] else None)

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


def _behind_start(window: Window, run: range, start_token: int, end_token: int | None) -> np.ndarray:
    """A window's tokens and then the end as targets, and as tokens the ones before them, of which the start is first.

    Without an `end_token` nothing ends them.
    """
    length = window.stop - window.start
    before = min(max(run.start - 1, 0), length)
    found = window.stream.tokens[window.start + before : window.start + min(run.stop, length)].astype(np.int32)
    first, last = [start_token] * (run.start == 0), [end_token] * (end_token is not None)
    sequence = np.array([*first, *found, *last], np.int32)  # from position `run.start` on
    count = min(max(length + len(last) - run.start, 0), len(run))
    tokens, targets = np.zeros(len(run), np.int32), np.full(len(run), IGNORED, np.int32)
    tokens[:count], targets[:count] = sequence[:count], sequence[1 : count + 1]
    return np.stack((tokens, targets))
