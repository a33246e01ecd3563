"""The lines of a file of records, gzipped or not, with their numbers."""

import gzip
from collections.abc import Iterator
from pathlib import Path

from lss_jax.data.files import readable

BLOCK = 2**18  # bytes; a longer line comes in pieces
GZIP = b"\x1f\x8b"  # with which a gzipped file begins, whatever its name


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its number; of a line longer than `BLOCK` its pieces.

    Raises:
      ConfigError: the file cannot be read, or is no whole gzip file.
    """
    number = 1
    with readable(path, lambda: f", line {number}:"), path.open("rb") as raw:
        zipped = raw.read(len(GZIP)) == GZIP
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw, mode="rb") if zipped else raw as file:
            while piece := file.readline(BLOCK):
                yield number, piece
                number += piece.endswith(b"\n")
