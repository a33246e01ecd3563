"""Reading files: in parts, unmapped, as reading a mapped file that has shrunk is a SIGBUS; and what may go wrong."""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lss_jax.config.schema import ConfigError, RunError


class ReadInParts:
    """An open file; `shown` is how errors call it. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path, shown: str):
        self.path, self._shown = path, shown
        self._file = path.open("rb", buffering=0)
        self._seen = os.fstat(self._file.fileno())

    def bytes_at(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, no others.

        Raises:
          RunError: they cannot be read any more.
        """
        try:
            found = os.pread(self._file.fileno(), stop - start, start)
        except OSError as error:
            raise self.changed(f"cannot be read any more ({error.strerror})") from error
        if len(found) < stop - start:
            raise self.changed(f"ends before byte {stop}")
        return found

    def mapped(self) -> np.ndarray:
        """All bytes of the file, memory-mapped."""
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def check(self) -> None:
        """Raises a RunError if the file has changed since it was opened."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise self.changed(f"cannot be found any more ({error.strerror})") from error
        if now.st_size != self._seen.st_size:
            raise self.changed(f"has {now.st_size} bytes now")
        if (now.st_mtime_ns, now.st_ino) != (self._seen.st_mtime_ns, self._seen.st_ino):
            raise self.changed("was written to")

    def changed(self, what: str) -> RunError:
        """The error for a file that is not what it was."""
        return RunError(
            f"{self._shown} had {self._seen.st_size} bytes when the run started, and {what}; put the file back as it "
            f"was, then the same command goes on from the last checkpoint"
        )


@contextmanager
def readable(path: Path, place: Callable[[], str] = str) -> Iterator[None]:
    """For reading a file, gzipped or not; `place` is how far that has come, for the error about a damaged one.

    Raises:
      ConfigError: it cannot be read, or is no whole gzip file.
    """
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        where = f"{path}{place()}"
        raise ConfigError(f"{where} is no whole gzip file ({error}); compress it again, or copy it again") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); make it readable, or leave it out") from error
