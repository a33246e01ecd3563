"""Long documents in pieces that can be encoded apart: where a cut changes no token."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lss_jax.data.documents import Block

PIECE = 2**16  # bytes; a longer text is cut behind the first place from here on where that may be
CONTEXT = 256  # bytes before and behind a cut that are encoded to see what it changes
TRIES = 8  # places of each kind that are tried in so many bytes
PLACES = (  # in this order; tokenizers differ in whether a line feed belongs to what follows it
    re.compile(rb"\n(?=\S)"),
    re.compile(rb"\n(?=\n\S)"),
    re.compile(rb"\S(?= \S)"),
)


class Piece(NamedTuple):
    """A document, or a part of one, which ends where no token does otherwise."""

    text: bytes
    prompt: bytes  # of the document that begins here
    begins: bool
    ends: bool
    where: str


def pieces(blocks: Iterable[Block], apart: Callable[[bytes, bytes], bool]) -> Iterator[Piece]:
    """The documents of these blocks; of a long one more than a piece is held only where no cut is possible.

    `apart` says whether two neighbouring texts have the same tokens apart as together.
    """
    text, begins = bytearray(), True
    searched = PIECE
    for block in blocks:
        text += block.text
        done = 0
        while cut := _first_cut(text, done, done + searched, apart):
            yield Piece(bytes(text[done:cut]), block.prompt if begins else b"", begins, False, block.where)
            done, begins, searched = cut, False, PIECE
        del text[:done]
        searched = max(len(text) - CONTEXT, PIECE)
        if block.ends:
            yield Piece(bytes(text), block.prompt if begins else b"", begins, True, block.where)
            text, begins, searched = bytearray(), True, PIECE


def _first_cut(text: bytearray, start: int, low: int, apart: Callable[[bytes, bytes], bool]) -> int | None:
    """The first place from `low` on, with `CONTEXT` behind it, where the text from `start` on may be cut."""
    for near in range(low, len(text) - CONTEXT, PIECE):
        far = min(near + PIECE, len(text) - CONTEXT)
        for kind in PLACES:
            for found in itertools.islice(kind.finditer(text, near, far), TRIES):
                cut = found.end()
                left, right = text[max(start, cut - CONTEXT) : cut], text[cut : cut + CONTEXT]
                if apart(_whole_characters(left), _whole_characters(right)):
                    return cut
    return None


def _whole_characters(text: bytearray) -> bytes:
    """The text without the parts of characters at its ends."""
    return text.decode(errors="ignore").encode()
