"""Text and its tokens: what a tokenizer is, and the simplest one, whose tokens are bytes."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

BYTES = "bytes"


class Tokenizer(Protocol):
    """Converts text (UTF-8 bytes) to tokens, and tokens to bytes.

    A token stands for the same bytes everywhere, so that a text can be decoded token by token.
    """

    name: str  # as in `data.tokenizer`
    items: str  # what a token is, in the plural
    vocab: int  # further tokens of a model's vocabulary stand for no text
    fingerprint: str  # "bytes", or the SHA-256 of the file
    end: int | None  # the token that ends documents
    end_text: str  # how it is written; empty if there is none
    first: np.ndarray  # int32, the tokens with which each text begins
    token_bytes: np.ndarray  # uint16 `[V]`, the length of `bytes_of`
    unlearned: int | None  # a token that is seen, and never a target

    def tokens_of(self, text: bytes) -> np.ndarray:
        """The tokens of a text, int32, from its `first` ones on."""

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""

    def encode(self, texts: Sequence[bytes], goes_on: Sequence[bool]) -> list[np.ndarray]:
        """The tokens of many texts, int32, without the `first` ones; some may go on with an earlier text."""

    def apart(self, left: bytes, right: bytes) -> bool:
        """Whether two neighbouring texts have the same tokens apart as together."""


def bytes_of(text: Tokenizer, token: int) -> bytes:
    """The bytes of a token, none of one that only the model has."""
    return text.bytes_of(token) if token < text.vocab else b""


def decoded(text: Tokenizer, tokens: Iterable[int]) -> str:
    """What these tokens stand for, without white space around it."""
    return b"".join(bytes_of(text, int(token)) for token in tokens).decode(errors="replace").strip()


class ByteText:
    """Each byte is a token."""

    name = fingerprint = items = BYTES
    vocab = 256
    unlearned: int | None = None
    end: int | None = None
    end_text = ""
    first = np.zeros(0, np.int32)
    token_bytes = np.ones(256, np.uint16)

    def tokens_of(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def bytes_of(self, token: int) -> bytes:
        return bytes([token])

    def encode(self, texts: Sequence[bytes], goes_on: Sequence[bool]) -> list[np.ndarray]:
        return [self.tokens_of(text) for text in texts]

    def apart(self, left: bytes, right: bytes) -> bool:
        return True
