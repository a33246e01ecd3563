"""Bases: their alphabet and tokens, and the other strand."""

from collections.abc import Sequence

import numpy as np

from lss_jax.config.genome_rules import BASES
from lss_jax.config.schema import ConfigError
from lss_jax.data.packing import Stream, Tokens
from lss_jax.data.windows import Window
from lss_jax.parallel.hashing import hashed_on_host

LETTERS = b"ACGTN"
UNKNOWN = LETTERS.index(b"N")  # the token of N: it is seen, and never a target
NO_BASE = 255
STRAND = 3  # a draw of a row; those of masked tokens are 0 to 2
READ_AS = (b"A", b"C", b"G", b"TU", b"NRYSWKMBDHV")  # by token; the last are all that IUPAC knows for several bases
COMPLEMENT = np.array([LETTERS.index(letter) for letter in b"TGCAN"], np.uint8)


def _tokens_of_letters() -> bytes:
    table = bytearray([NO_BASE]) * 256
    for token, letters in enumerate(READ_AS):
        for letter in letters + letters.lower():
            table[letter] = token
    return bytes(table)


TOKENS = _tokens_of_letters()


def tokens_of(text: bytes, without: bytes = b"") -> bytes:
    """The token of each letter, a byte each; leaves out the bytes `without`.

    Raises:
      ValueError: a letter is no base; the argument of the error is that letter.
    """
    tokens = text.translate(TOKENS, without)
    if NO_BASE in tokens:
        raise ValueError(next(chr(letter) for letter in text if letter not in without and TOKENS[letter] == NO_BASE))
    return tokens


class BaseText:
    """Each base is a token: A, C, G, T, and N for an unknown one; in lower case too, which says nothing here."""

    name = fingerprint = items = BASES
    vocab = len(LETTERS)
    unlearned: int | None = UNKNOWN
    end: int | None = None
    end_text = ""
    first = np.zeros(0, np.int32)
    token_bytes = np.ones(vocab, np.uint16)

    def tokens_of(self, text: bytes) -> np.ndarray:
        """The tokens of a text, int32.

        Raises:
          ConfigError: a letter is no base.
        """
        try:
            return np.frombuffer(tokens_of(text), np.uint8).astype(np.int32)
        except ValueError as error:
            raise ConfigError(
                f"{error.args[0]!r} is no base; write A, C, G and T, and N or another letter of IUPAC for an unknown "
                f"base, without spaces"
            ) from error

    def bytes_of(self, token: int) -> bytes:
        return LETTERS[token : token + 1]

    def encode(self, texts: Sequence[bytes], goes_on: Sequence[bool]) -> list[np.ndarray]:
        return [self.tokens_of(text) for text in texts]

    def apart(self, left: bytes, right: bytes) -> bool:
        return True


class _Backwards:
    """An array read from its end to its start, and no more of it than is asked for."""

    def __init__(self, array: Tokens):
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return self._array[len(self) - max(start, stop) : len(self) - start][::-1]


class _OtherStrand(_Backwards):
    """The reverse complement of bases."""

    def __getitem__(self, part: slice) -> np.ndarray:
        return COMPLEMENT[super().__getitem__(part)]


def other_strand(stream: Stream) -> Stream:
    """The reverse complement of a stream of bases: documents end where they began, and labels go with their bases."""
    documents, labels = stream.documents, stream.labels
    return Stream(
        _OtherStrand(stream.tokens),
        None if documents is None else documents.mirrored(len(stream.tokens)),
        None if labels is None else _Backwards(labels),
    )


def on_either_strand(windows: Sequence[Window], seed: int, turn: int) -> list[Window]:
    """Windows of which each is, with probability one half, the reverse complement: a hash of seed, turn and row."""
    are_turned = hashed_on_host(seed, turn, np.arange(len(windows)), STRAND) % 2
    return [_on_other_strand(window) if turned else window for window, turned in zip(windows, are_turned, strict=True)]


def _on_other_strand(window: Window) -> Window:
    """The same bases of the reverse complement; the next base there is the complement of the one before them here."""
    stream, length = window.stream, len(window.stream.tokens)
    return Window(other_strand(stream), length - window.stop, length - window.start)
