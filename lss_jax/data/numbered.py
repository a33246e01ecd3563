"""The lines of a file of records, gzipped or not, with their numbers."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from lss_jax.config.schema import ConfigError

BLOCK = 2**18  # bytes; a longer line comes in pieces
GZIP = b"\x1f\x8b"  # with which a gzipped file begins, whatever its name


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its number; of a line longer than `BLOCK` its pieces.

    Raises:
      ConfigError: the file cannot be read, or is no whole gzip file.
    """
    number = 1
    try:
        with path.open("rb") as raw:
            zipped = raw.read(len(GZIP)) == GZIP
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw, mode="rb") if zipped else raw as file:
                while piece := file.readline(BLOCK):
                    yield number, piece
                    number += piece.endswith(b"\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path}, line {number}: is no whole gzip file ({error}); compress it again, or copy it again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); make it readable, or leave it out") from error
