"""Pairs of a source and a target, each a run of tokens: documents with a prompt and an answer, or generated ones.

A batch has a row for each pair. As of windows, each device's callback reads the tokens of its own segments, of the
source and of the target; which pairs a batch has is a function of (seed, step) alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.batch import IGNORED
from lss_jax.data.loader import runs_of
from lss_jax.data.packing import Stream
from lss_jax.parallel.layout import SEQUENCE, SOURCE, layout_on, padded_length
from lss_jax.parallel.mesh import DATA, SEQ, shardings

BLOCK = 4096  # tokens of a generated source that are drawn together


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


SPECS = PairBatch(P(DATA, SEQ), P(DATA, SEQ), P(DATA, SEQ), P(SEQ), P(SEQ), P(None, DATA), P(DATA))


def pairs_like(config: Config, mesh: Mesh | AbstractMesh) -> PairBatch:
    """Global shapes and shardings of a batch of pairs."""
    B, S, L = config.data.batch_size, *(padded_length(config, mesh, sequence) for sequence in (SOURCE, SEQUENCE))
    shapes = PairBatch((B, S), (B, L), (B, L), (L,), (S,), (2, B), (B,))
    placed = shardings(SPECS, mesh)
    return PairBatch(*(jax.ShapeDtypeStruct(s, np.int32, sharding=p) for s, p in zip(shapes, placed, strict=True)))


class Pairs(Protocol):
    """Numbered pairs, of which parts are read."""

    def __len__(self) -> int: ...

    def lengths(self, number: int) -> tuple[int, int]:
        """The tokens of a pair's source and of its target; none behind the last pair."""

    def source(self, number: int, start: int, stop: int) -> np.ndarray:
        """The tokens of a source from `start` to `stop`."""

    def target(self, number: int, start: int, stop: int) -> np.ndarray:
        """The tokens of a target from `start` to `stop`."""


class DocumentPairs:
    """The documents of a stream, each a prompt and its answer: the source, and the target.

    Raises:
      ConfigError: no document has a prompt.
    """

    def __init__(self, stream: Stream, name: str):
        assert stream.documents is not None, "a token file says which documents it has"
        self._tokens, self._places_3D = stream.tokens, stream.documents.pairs()
        start_D, first_D, _ = self._places_3D
        if not np.any(first_D > start_D + 1):
            raise ConfigError(
                f"{name} has {len(first_D)} documents, none with a prompt, so there is no source to read; encode JSONL "
                f"with prompts and answers: data.prompt_field and data.answer_field, or python -m lss_jax.tokenize "
                f"--prompt-field and --answer-field"
            )

    def __len__(self) -> int:
        return self._places_3D.shape[1]

    def longer_than(self, source: int, target: int) -> int:
        """How many pairs have a longer source or target."""
        start_D, first_D, end_D = self._places_3D
        return int(np.count_nonzero((first_D - start_D > source) | (end_D - first_D > target)))

    def lengths(self, number: int) -> tuple[int, int]:
        if number >= len(self):
            return 0, 0
        start, first, end = self._places_3D[:, number].tolist()
        return first - start, end - first

    def source(self, number: int, start: int, stop: int) -> np.ndarray:
        return self._read(number, 0, start, stop)

    def target(self, number: int, start: int, stop: int) -> np.ndarray:
        return self._read(number, 1, start, stop)

    def _read(self, number: int, part: int, start: int, stop: int) -> np.ndarray:
        offset = int(self._places_3D[part, number])
        return self._tokens[offset + start : offset + stop]


class GeneratedPairs:
    """Random sources of `length` symbols, and each as its own target, or reversed.

    A symbol depends on the seed, the number of its pair and its position, and not on what else is read.
    """

    def __init__(self, seed: int, symbols: int, length: int, *, first: int, count: int, reverse: bool):
        self._seed, self._symbols, self._length = seed, symbols, length
        self._first, self._count, self._reverse = first, count, reverse

    def __len__(self) -> int:
        return self._count

    def lengths(self, number: int) -> tuple[int, int]:
        return (self._length, self._length) if number < self._count else (0, 0)

    def source(self, number: int, start: int, stop: int) -> np.ndarray:
        first = start // BLOCK
        drawn = [self._block(number, block) for block in range(first, -(-stop // BLOCK))]
        return np.concatenate([np.zeros(0, np.int64), *drawn])[start - first * BLOCK :][: stop - start]

    def target(self, number: int, start: int, stop: int) -> np.ndarray:
        if not self._reverse:
            return self.source(number, start, stop)
        return self.source(number, self._length - stop, self._length - start)[::-1]

    def _block(self, number: int, block: int) -> np.ndarray:
        return np.random.default_rng((self._seed, self._first + number, block)).integers(0, self._symbols, BLOCK)


class Place(NamedTuple):
    """A row of a batch: a pair among some."""

    pairs: Pairs
    number: int


def read_pairs(places: Sequence[Place], config: Config, mesh: Mesh, start_token: int) -> PairBatch:
    """The global batch of some pairs, sharded over the mesh.

    Sources and targets that are too long lose their ends. Tokens of padding are 0, and its targets ignored.
    """
    like, data = pairs_like(config, mesh), config.data
    position_S, position_L = (
        layout_on(config, mesh, sequence).positions(padded_length(config, mesh, sequence))
        for sequence in (SOURCE, SEQUENCE)
    )
    lengths_2B = np.minimum(
        np.array([pairs.lengths(number) for pairs, number in places]).T, [[data.source_len], [data.seq_len]]
    ).astype(np.int32)

    @functools.cache  # tokens and targets share one read; so do devices that hold the same segment
    def segment(of: str, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """`[2, rows, columns]`, tokens and targets; of a source both are its tokens."""
        positions = (position_S if of == SOURCE else position_L)[left:right]
        rows = [_read(places[row], of, positions, lengths_2B[:, row], start_token) for row in range(top, bottom)]
        return np.stack(rows, axis=1)

    def tokens_of(of: str, which: int, shape: tuple[int, ...], index: Any) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (part.indices(size) for part, size in zip(index, shape, strict=True))
        return segment(of, top, bottom, left, right)[which]

    def array(shape: Any, callback: Callable[[Any], np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(shape.shape, shape.sharding, callback)

    return PairBatch(
        source=array(like.source, functools.partial(tokens_of, SOURCE, 0, like.source.shape)),
        tokens=array(like.tokens, functools.partial(tokens_of, SEQUENCE, 0, like.tokens.shape)),
        targets=array(like.targets, functools.partial(tokens_of, SEQUENCE, 1, like.targets.shape)),
        positions=array(like.positions, lambda index: position_L[index]),
        source_positions=array(like.source_positions, lambda index: position_S[index]),
        lengths=array(like.lengths, lambda index: lengths_2B[index]),
        rows=array(like.rows, lambda index: np.arange(len(places), dtype=np.int32)[index]),
    )


def _read(place: Place, of: str, positions: np.ndarray, lengths: np.ndarray, start_token: int) -> np.ndarray:
    """Tokens and targets at these positions of a pair's source, or of its target."""
    runs = runs_of(positions)
    if of == SOURCE:
        found = [_source(place, run, int(lengths[0])) for run in runs]
    else:
        found = [_target(place, run, int(lengths[1]), start_token) for run in runs]
    return np.concatenate(found, axis=1)


def _source(place: Place, run: range, length: int) -> np.ndarray:
    tokens, stop = np.zeros(len(run), np.int32), min(run.stop, length)
    if run.start < stop:
        tokens[: stop - run.start] = place.pairs.source(place.number, run.start, stop)
    return np.stack((tokens, tokens))


def _target(place: Place, run: range, length: int, start_token: int) -> np.ndarray:
    """Targets, and as tokens the ones before them; before the first is the start token."""
    tokens, targets = np.zeros(len(run), np.int32), np.full(len(run), IGNORED, np.int32)
    count = min(run.stop, length) - run.start
    if count > 0:
        before = max(run.start - 1, 0)
        found = place.pairs.target(place.number, before, run.start + count)
        targets[:count] = found[run.start - before :]
        tokens[:count] = found[:count] if run.start else np.concatenate(([start_token], found[: count - 1]))
    return np.stack((tokens, targets))
