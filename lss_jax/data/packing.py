"""Documents packed into one long stream of tokens: where each starts and ends, and which of its tokens are targets."""

import re
from typing import Any, NamedTuple, Protocol

import numpy as np

from lss_jax.config.schema import ConfigError
from lss_jax.data.token_file import TokenFile

ENDLESS = np.iinfo(np.int64).max
IGNORED_LABEL = 255
NEAR = 40  # a border between splits moves by less than one in so many of the tokens


class Tokens(Protocol):
    """A long array of tokens (unsigned integers) of which slices are read: a NumPy array, or a part of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Packing:
    """The documents of a stream, packed one after the other; the last one goes on to the end of the stream.

    Args:
      ends: int64 `[D]`, ascending: the offset behind each document's last token.
      first_targets: int64 `[D]`, the offset of each document's first token that counts as a target; None: its second.
      origin: the offset of the stream's first token, from which on its own are counted.
    """

    def __init__(self, ends: np.ndarray, first_targets: np.ndarray | None = None, origin: int = 0):
        self._borders, self._first_targets, self._origin = ends[:-1], first_targets, origin
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Where in the stream a document starts and ends."""
        start = int(self._ends[number - 1]) - self._origin if number else 0
        return start, int(self._ends[number]) - self._origin

    def first_target(self, number: int) -> int:
        """Where in the stream the tokens of a document begin that count as targets."""
        return self[number][0] + 1 if self._first_targets is None else int(self._first_targets[number]) - self._origin

    def mirrored(self, length: int) -> "Packing":
        """The documents of the stream of this length, read backwards."""
        assert self._first_targets is None, "prompts are read forwards"
        return Packing(np.append(length + self._origin - self._borders[::-1], ENDLESS))

    def limits(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document starts, and where it ends, in a stream of this length: int64 `[D]` each."""
        return self._starts - self._origin, np.minimum(self._ends - self._origin, length)

    def lengths(self) -> np.ndarray:
        """The tokens of each document before its first target, and from there on: int64 `[2, D]`."""
        firsts = self._starts + 1 if self._first_targets is None else self._first_targets
        return np.stack((firsts - self._starts, self._ends - firsts))

    @property
    def _starts(self) -> np.ndarray:
        return np.concatenate(([self._origin], self._borders))

    def bounds(self, offsets: np.ndarray) -> np.ndarray:
        """Where in the stream the documents of the tokens at these offsets start and end, `[2, *offsets.shape]`."""
        number = self.number(offsets)
        starts = np.where(number > 0, self._ends[number - 1] - self._origin, 0)
        ends = np.where(number < len(self) - 1, self._ends[number] - self._origin, ENDLESS)
        return np.stack((starts, ends))

    def are_targets(self, offsets: np.ndarray) -> np.ndarray:
        """Whether the tokens at these offsets count as targets: they are learned, and not the first of a document."""
        if self._first_targets is None:
            return offsets > self.bounds(offsets)[0]
        return offsets + self._origin >= self._first_targets[self.number(offsets)]

    def number(self, offsets: Any) -> Any:
        """The number of the document of the token at an offset, or at each of several."""
        return np.searchsorted(self._borders, offsets + self._origin, side="right")


class Stream(NamedTuple):
    """A split of a source."""

    tokens: Tokens
    documents: Packing | None  # that the tokens are; None: all are one, and no batch says so
    labels: Tokens | None  # uint8, of each token, `IGNORED_LABEL` where there is none; None: of no token


def separated(text: np.ndarray, separator: str) -> Packing | None:
    """The documents of a text (uint8), each of which ends with `separator`; None if that is empty. Reads all of it.

    Raises:
      ConfigError: the separator does not occur.
    """
    if not separator:
        return None
    ends = np.fromiter((match.end() for match in re.finditer(re.escape(separator.encode()), text.data)), np.int64)
    if not len(ends):
        raise ConfigError(
            f"data.separator={separator!r} does not occur in a split of {len(text)} bytes; give a string that ends "
            f"documents (in a shell $'\\n\\n' is two line feeds), or leave it empty"
        )
    return Packing(np.append(ends, ENDLESS))


def undivided() -> Packing:
    """A stream as a single document, among others that have several."""
    return Packing(np.array([ENDLESS]))


def documents_between(file: TokenFile, start: int, stop: int) -> Packing:
    """The documents, whole or in part, of the tokens from `start` to `stop` of a token file."""
    first = np.searchsorted(file.document_ends, start, side="right")
    last = np.searchsorted(file.document_ends, stop, side="left")
    return Packing(file.document_ends[first : last + 1], file.first_targets[first : last + 1], start)


def split_ends(file: TokenFile) -> list[int]:
    """Where the splits of a token file end: at 90, 95 and 100 percent of its tokens, or near there between documents.

    A border moves to the nearest end of a document if that is nearer than half of the smaller splits; in a long
    document it stays. Between a prompt and its answer it never stays.

    Raises:
      ConfigError: there are too few documents for that.
    """
    first = _border(file, file.size * 90 // 100, after=0, documents_behind=2)
    second = _border(file, file.size * 95 // 100, after=first, documents_behind=1)
    return [first, second, file.size]


def _border(file: TokenFile, wanted: int, after: int, documents_behind: int) -> int:
    """The border next to `wanted` that comes after another, and leaves so many documents behind it."""
    ends = file.document_ends
    number = int(np.searchsorted(ends, wanted, side="left"))
    start = int(ends[number - 1]) if number else 0
    possible = ends[int(np.searchsorted(ends, after, side="right")) : len(ends) - documents_behind]
    nearest = min(_neighbours(possible, wanted), key=lambda end: abs(end - wanted), default=None)
    if file.first_targets[number] <= start + 1 and (nearest is None or abs(nearest - wanted) * NEAR >= file.size):
        return wanted
    if nearest is None:
        raise ConfigError(
            f"{file.path}: {len(ends)} documents are too few for three splits that cut no prompt from its answer; "
            f"encode more of them, at least 3 of much the same length"
        )
    return nearest


def _neighbours(ends: np.ndarray, wanted: int) -> list[int]:
    """The last of these ends before a place, and the first behind it."""
    number = int(np.searchsorted(ends, wanted, side="left"))
    return [int(end) for end in ends[max(number - 1, 0) : number + 1]]
