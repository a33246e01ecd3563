"""The token file: a corpus encoded once, in a safetensors file that other programs open too.

Its arrays::

    tokens         [T] uint8, uint16 or uint32, the smallest that holds the vocabulary
    document_ends  [D] int64, the offset behind the last token of each document; the last one is T
    first_targets  [D] int64, the offset of each document's first token that counts as a target
    token_bytes    [V] uint16, the bytes of text that each token stands for, 0 for special ones

A document's first token is never predicted, so its first target is the second one, or a later one behind a prompt.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError
from lss_jax.data.files import ReadInParts
from lss_jax.storage.tensor_files import DTYPES, LENGTH_BYTES, header_of

FORMAT = "lss_jax tokens 1"
MAGIC = b'"lss_jax tokens'  # near the start of every version's header
LONGEST_HEADER = 100_000_000  # bytes; the library `safetensors` reads no longer one
LOOKED_AT = 2**28  # tokens of which the largest is found when a file is opened, in a fraction of a second
ARRAYS = {
    "tokens": ("U8", "U16", "U32"),
    "document_ends": ("I64",),
    "first_targets": ("I64",),
    "token_bytes": ("U16",),
}
AGAIN = "encode it again with python -m lss_jax.tokenize"


class About(NamedTuple):
    """What a token file says of its text: strings in the file's metadata."""

    tokenizer: str  # "bytes", or the SHA-256 of the tokenizer.json
    end: str  # the token that ends documents; empty: none
    text_bytes: int  # of the original text
    files: list[tuple[str, int]]  # the files of the text, each with its bytes


class Column(NamedTuple):
    """An array to be written piece by piece."""

    dtype: np.dtype
    size: int
    pieces: Iterable[np.ndarray]


class _Place(NamedTuple):
    dtype: np.dtype
    size: int
    offset: int  # in the file, in bytes


class TokenFile(ReadInParts):
    """A source of tokens in a file.

    Attributes:
      size: the number of tokens, T.
      vocab: the size of the vocabulary, V.
      document_ends, first_targets: int64 `[D]`, as in the file.
      token_bytes: uint16 `[V]`.

    Raises:
      ConfigError: it cannot be read, is no token file or a truncated one, or its parts contradict one another.
    """

    def __init__(self, path: Path | str):
        try:
            super().__init__(Path(path), f"token file {str(path)!r}")
            header, start = _header(self.path, self._seen.st_size)
            self._places = _places(self.path, header, start, self._seen.st_size)
            self.document_ends, self.first_targets, self.token_bytes = (
                self._array(name) for name in ("document_ends", "first_targets", "token_bytes")
            )
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); give a token file") from error
        about = _about(self.path, header)
        self.tokenizer, self.end, self.text_bytes, self.files = about
        self.vocab = len(self.token_bytes)
        self.dtype, self.size, self._start = self._places["tokens"]
        _check(self)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to `stop`, of the file's dtype, and no others.

        Raises:
          RunError: the file has changed, or a token is none of the vocabulary.
        """
        width = self.dtype.itemsize
        tokens = np.frombuffer(self.bytes_at(self._start + start * width, self._start + stop * width), self.dtype)
        if len(tokens) and tokens.max() >= self.vocab:
            raise self.changed(f"has token {tokens.max()} in {start} to {stop}, of a vocabulary of {self.vocab}")
        return tokens

    def largest(self) -> int:
        """The largest of the first `LOOKED_AT` tokens."""
        return int(np.memmap(self.path, self.dtype, "r", self._start, min(self.size, LOOKED_AT)).max(initial=0))

    def _array(self, name: str) -> np.ndarray:
        dtype, size, offset = self._places[name]
        return np.fromfile(self.path, dtype, size, offset=offset)


def is_token_file(path: Path | str) -> bool:
    """Whether a file begins like a token file of any version, truncated or not."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    return length <= LONGEST_HEADER and start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and MAGIC in start


def dtype_of(vocab: int) -> np.dtype:
    """The smallest dtype that holds every token of a vocabulary."""
    return next(
        dtype for dtype in (np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4")) if vocab <= 2 ** (8 * dtype.itemsize)
    )


def write_token_file(path: Path, about: About, columns: Mapping[str, Column]) -> None:
    """Writes a token file, whole or not at all, without ever holding more of it than a piece; raises OSError.

    `columns` are the four arrays by their names. The widest come first, so that each begins at a multiple of its width.

    Raises:
      ConfigError: there are so many files that their names make no readable header.
    """
    ordered = sorted(columns.items(), key=lambda item: -item[1].dtype.itemsize)
    header = _header_of(path, about, ordered)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for name, column in ordered:
                before = file.tell()
                for piece in column.pieces:
                    file.write(np.ascontiguousarray(piece, column.dtype).data)
                assert file.tell() - before == column.size * column.dtype.itemsize, f"{name} is as long as announced"
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _header_of(path: Path, about: About, columns: list[tuple[str, Column]]) -> bytes:
    metadata = {
        "format": FORMAT,
        "tokenizer": about.tokenizer,
        "end": about.end,
        "text_bytes": str(about.text_bytes),
        "files": json.dumps(about.files),
    }
    header = header_of({name: (column.dtype, (column.size,)) for name, column in columns}, metadata)
    if len(header) > LONGEST_HEADER:
        raise ConfigError(
            f"{path}: the names of {len(about.files)} files make a header of {len(header)} bytes, more than the "
            f"{LONGEST_HEADER} that can be read; put the documents into fewer files, as JSONL"
        )
    return header


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file as a dictionary, and the offset of the first array."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > LONGEST_HEADER:
            raise ConfigError(f"{path} is no token file ({size} bytes, and no safetensors header); {AGAIN}")
        if size < LENGTH_BYTES + length:
            raise _truncated(path, size, LENGTH_BYTES + length, "its header alone has")
        written = file.read(length)
    try:
        header = json.loads(written)
    except ValueError as error:
        raise ConfigError(f"{path} is no token file (its header is not JSON: {error}); {AGAIN}") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path} is no token file: its format is {found!r}, not {FORMAT!r}; {AGAIN}")
    return header, LENGTH_BYTES + length


def _places(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, _Place]:
    """The arrays' places in the file, checked against its size and one another."""
    places, end = {}, start
    for name, codes in ARRAYS.items():
        try:
            code, (count,), (first, stop) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            sound = code in codes and first >= 0 and stop - first == count * DTYPES[code].itemsize
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            shown = header.get(name, "missing")
            raise ConfigError(f"{path} is no token file: {name} is {shown}, not one of {codes} with a size; {AGAIN}")
        places[name], end = _Place(DTYPES[code], count, start + first), max(end, start + stop)
    if size < end:
        raise _truncated(path, size, end, "its header announces")
    used = sum(place.size * place.dtype.itemsize for place in places.values())
    if size > end or used != end - start:
        raise ConfigError(f"{path} has {size - start} bytes behind its header, but its arrays have {used}; {AGAIN}")
    return places


def _truncated(path: Path, size: int, expected: int, what: str) -> ConfigError:
    return ConfigError(f"{path} has {size} bytes, but {what} {expected}: it is truncated; copy it again, or {AGAIN}")


def _about(path: Path, header: dict[str, Any]) -> About:
    metadata = header["__metadata__"]
    try:
        files = [(str(name), int(size)) for name, size in json.loads(metadata["files"])]
        return About(metadata["tokenizer"], metadata["end"], int(metadata["text_bytes"]), files)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no token file: its metadata lack something ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def _check(file: TokenFile) -> None:
    """Raises a ConfigError for arrays that contradict one another."""
    ends, firsts = file.document_ends, file.first_targets
    problems = []
    if len(ends) != len(firsts) or not len(ends):
        problems.append(f"document_ends has {len(ends)} documents, first_targets {len(firsts)}")
    elif ends[-1] != file.size or np.any(np.diff(ends, prepend=0) <= 0):
        problems.append(f"document_ends do not increase from 1 or more to the {file.size} tokens")
    elif np.any(firsts <= np.concatenate(([0], ends[:-1]))) or np.any(firsts > ends):
        problems.append("first_targets are not behind the first token of their documents, or beyond the last")
    if (largest := file.largest()) >= file.vocab:
        problems.append(f"there is a token {largest}, of a vocabulary of {file.vocab}")
    if file.dtype != dtype_of(file.vocab):
        problems.append(f"tokens are {file.dtype}, but a vocabulary of {file.vocab} has {dtype_of(file.vocab)}")
    if problems:
        raise ConfigError("\n".join(f"{file.path} contradicts itself: {problem}; {AGAIN}" for problem in problems))
