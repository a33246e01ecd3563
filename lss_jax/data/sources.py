"""Sources of bytes: the standard library's own sources, enwik8, or any text file."""

import hashlib
import itertools
import os
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lss_jax.config.schema import ConfigError, DataConfig
from lss_jax.data.files import ReadInParts
from lss_jax.data.token_file import TokenFile
from lss_jax.storage.tensor_files import LENGTH_BYTES

WHOLE = 2**28  # bytes; of a longer file this many are hashed, in evenly spaced blocks
BLOCK = 2**12

# enwik8 (Mahoney 2006): the first 10^8 bytes of the English Wikipedia dump of 2006-03-03.
ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_ZIP_BYTES = 36_445_475
ENWIK8_ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = {  # of its first N bytes, by N; the longest prefix that a file covers is checked
    65_536: "05fc5f44993ef0557959db76bf47e45badb2dd9c69d93ce08911935b5e52bf40",
    4_000_000: "9f9ca3a41e2b87a0268d00380577e2c308e07959b22a94c8d7b1e8901bdefc37",
    ENWIK8_BYTES: "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
}
NEEDS_NO_DOWNLOAD = "configs/default.py needs no download"
SPLITS = ("train", "valid", "test")
SHORTEST = 40  # bytes or tokens; 5% of them are two, one and its target
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


class Source(Protocol):
    """A long array of tokens (of text read as it is: bytes), in memory or in a file."""

    size: int  # in tokens
    text_bytes: int  # of the text that they stand for

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to `stop` (unsigned integers), no others."""

    def mapped(self) -> np.ndarray:
        """The bytes of all of it, memory-mapped if it is a file."""

    def check(self) -> None:
        """Raises a RunError if the source has changed since it was opened."""


class MemorySource:
    """A source in memory."""

    def __init__(self, data: np.ndarray):
        self._data, self.size, self.text_bytes = data, len(data), len(data)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._data[start:stop]

    def mapped(self) -> np.ndarray:
        return self._data

    def check(self) -> None:
        pass


class FileSource(ReadInParts):
    """A source in a file."""

    def __init__(self, path: Path):
        super().__init__(path, f"data.path={str(path)!r}")
        self.size = self.text_bytes = self._seen.st_size

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.frombuffer(self.bytes_at(start, stop), np.uint8)


class Part:
    """A part of a source that reads like an array of tokens; every reading is an audit event, `lss_jax.read`.

    The event has the first token that is read and the one behind the last, as offsets in the source, in tokens.
    """

    def __init__(self, source: Source, start: int, stop: int):
        self.source, self.start, self.stop = source, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        sys.audit("lss_jax.read", self.start + start, self.start + max(start, stop))
        return self.source.read(self.start + start, self.start + max(start, stop))

    def mapped(self) -> np.ndarray:
        """All of it, memory-mapped if it is a file."""
        return self.source.mapped()[self.start : self.stop]


def open_splits(config: DataConfig) -> dict[str, Part]:
    """Opens the configured source as its first 90 ("train"), next 5 ("valid") and last 5 percent ("test").

    Raises:
      ConfigError: the file is missing, empty, too short for one training window, or not what it should be; or a
        download failed.
    """
    source = SOURCES[config.source](config.path)
    return splits_of(source, f"data.source={config.source!r}, data.path={config.path!r}", "bytes", config.seq_len)


def splits_of(source: Source, name: str, unit: str, seq_len: int, ends: Sequence[int] | None = None) -> dict[str, Part]:
    """A source as splits with these ends, by default at 90, 95 and 100 percent of it.

    Its name, and the unit of its size, are for errors.

    Raises:
      ConfigError: it is too short for one training window, or for three splits.
    """
    ends = ends or [source.size * percent // 100 for percent in (90, 95, 100)]
    shown, (train, valid, size) = f"{name}: {source.size} {unit}", ends
    if train < seq_len + 1:
        raise ConfigError(
            f"{shown} give {train} for training (90%), but one window takes data.seq_len + 1 = {seq_len + 1}; use a "
            f"longer file or a smaller data.seq_len"
        )
    if size < SHORTEST or min(valid - train, size - valid) < 2:
        raise ConfigError(f"{shown} are too few for a validation and a test split; use at least {SHORTEST} {unit}")
    return {name: Part(source, *at) for name, at in zip(SPLITS, itertools.pairwise((0, *ends)), strict=True)}


def fingerprint(*sources: Source) -> dict[str, Any]:
    """Size and SHA-256 of all sources together, and the size of their text.

    Of a long one only blocks are read, evenly spaced from its start to its end.
    """
    contents = [_contents(source) for source in sources]
    digests = [_sha256(data) for data in contents]
    return {
        "bytes": sum(map(len, contents)),
        "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "text_bytes": sum(source.text_bytes for source in sources),
    }


def _contents(source: Source) -> np.ndarray:
    """The bytes of a source; of a token file without its header, which says where the files of its text were."""
    data = source.mapped()
    if not isinstance(source, TokenFile):
        return data
    return data[LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES].tobytes(), "little") :]


def _sha256(data: np.ndarray) -> str:
    digest = hashlib.sha256()
    if len(data) <= WHOLE:
        digest.update(data.data)
    else:
        for start in np.linspace(0, len(data) - BLOCK, WHOLE // BLOCK).astype(np.int64):
            digest.update(data[start : start + BLOCK].data)
    return digest.hexdigest()


def stdlib(path: str) -> MemorySource:
    """The source files of the running Python's standard library, concatenated; `path` is not used.

    They are ordered by the hash of their names, which is reproducible and makes the three splits similar.

    Raises:
      ConfigError: this Python has no source files.
    """
    return MemorySource(np.frombuffer(b"".join(file.read_bytes() for file in stdlib_files()), dtype=np.uint8))


def stdlib_files() -> list[Path]:
    """The source files of the standard library, in the order of `stdlib`, without the empty ones."""
    root = Path(sysconfig.get_path("stdlib"))
    relative = [name.relative_to(root) for name in root.rglob("*.py")]
    names = [name for name in relative if not STDLIB_LEFT_OUT & set(name.parts) and (root / name).is_file()]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    if not names:
        raise ConfigError(f'data.source="stdlib": no .py files under {root}; use data.source="text" and data.path')
    return [root / name for name in names if (root / name).stat().st_size]


def text(path: str) -> FileSource:
    """Any file, read as bytes.

    Raises:
      ConfigError: it is missing, empty or unreadable.
    """
    check_file(path)
    file = Path(path).expanduser()
    try:
        return FileSource(file)
    except OSError as error:
        raise ConfigError(f"data.path={path!r} cannot be read ({error.strerror}); make it readable") from error


def check_file(path: str) -> None:
    """Raises a ConfigError for a file that is missing or empty."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"data.path={path!r} is not a file; give the path of a text file ({NEEDS_NO_DOWNLOAD})")
    if file.stat().st_size == 0:
        raise ConfigError(f"data.path={path!r} is empty (0 bytes); give a file with text in it ({NEEDS_NO_DOWNLOAD})")


def enwik8(path: str) -> FileSource:
    """The file at `path`, enwik8 or a prefix of it; without a path, all of enwik8, cached or downloaded.

    Raises:
      ConfigError: the file is missing or is not enwik8, or the download failed.
    """
    path = path or str(_downloaded_enwik8())
    source = text(path)
    if source.size > ENWIK8_BYTES:
        raise ConfigError(
            f"data.path={path!r} has {source.size} bytes, but enwik8 has {ENWIK8_BYTES}; give the raw file (unzipped) "
            f'or a prefix of it, or use data.source="text"'
        )
    for length in sorted(ENWIK8_SHA256, reverse=True):
        if length <= source.size:
            _check_sha256(source.mapped()[:length], ENWIK8_SHA256[length], path)
            break
    return source


def _check_sha256(data: np.ndarray, expected: str, path: str) -> None:
    found = hashlib.sha256(data.data).hexdigest()
    if found != expected:
        raise ConfigError(
            f"data.path={path!r}: sha256 of the first {len(data)} bytes is {found}, but enwik8 has {expected}; "
            f'fetch it again from {ENWIK8_URL}, or use data.source="text" for a file of your own'
        )


def _downloaded_enwik8() -> Path:
    """The path of enwik8 in the cache folder; on first use it is downloaded, checked and unpacked."""
    import pooch  # imported late: in a notebook the import itself warns about progress bars

    cache = Path(pooch.os_cache("lss_jax"))
    raw = cache / "enwik8"
    if raw.is_file():
        return raw
    try:
        zipped = pooch.retrieve(
            ENWIK8_URL, known_hash=f"sha256:{ENWIK8_ZIP_SHA256}", fname="enwik8.zip", path=cache, progressbar=True
        )
        with zipfile.ZipFile(zipped) as archive:
            unfinished = archive.extract("enwik8", cache / "unfinished")
        os.replace(unfinished, raw)  # all or nothing: half a file would pass for a prefix
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        raise ConfigError(
            f"enwik8 cannot be downloaded ({reason}); fetch {ENWIK8_URL} ({ENWIK8_ZIP_BYTES} "
            f"bytes, sha256 {ENWIK8_ZIP_SHA256}) elsewhere, unzip it and give data.path ({NEEDS_NO_DOWNLOAD})"
        ) from error
    return raw


SOURCES: dict[str, Callable[[str], Source]] = {"stdlib": stdlib, "enwik8": enwik8, "text": text}
