"""The parts of a token file in the making: a locked folder of files, each whole, which are joined in the end."""

import contextlib
import fcntl
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError, RunError
from lss_jax.data.text import Tokenizer
from lss_jax.data.token_file import About, Column, dtype_of, write_token_file

LOCK = "lock"


class Part(NamedTuple):
    """Encoded text: whole documents, and at its two ends perhaps parts of some; offsets count from its first token."""

    tokens: np.ndarray
    document_ends: np.ndarray  # int64, of the documents that end in it
    first_targets: np.ndarray  # int64, of the documents that begin in it
    text_bytes: np.ndarray  # int64, one number
    empty: np.ndarray  # int64, one number: documents without text, which are left out


@contextlib.contextmanager
def locked_folder(out: Path) -> Iterator[Path]:
    """The folder of the parts of `out`, made if needed; no other process has it meanwhile.

    Raises:
      RunError: another process has it.
      ConfigError: it cannot be made.
    """
    folder = out.with_name(f"{out.name}.parts")
    try:
        while (lock := _locked(folder)) is None:
            pass
    except BlockingIOError as error:
        raise RunError(f"another process is writing {out}; wait for it, or choose another --out") from error
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another --out") from error
    try:
        yield folder
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):  # NFS removes a folder only when no file in it is open
            folder.rmdir()


def _locked(folder: Path) -> int | None:
    """The open and locked file LOCK of the folder; None if another process has removed it meanwhile."""
    folder.mkdir(exist_ok=True)
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
            return lock
    except FileNotFoundError:
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def prepare(folder: Path, request: dict[str, Any]) -> None:
    """Leaves parts in the folder only if they were made for the same request."""
    written, noted = json.dumps(request), folder / "request.json"
    if noted.exists() and noted.read_text() == written:
        return
    for file in folder.iterdir():
        if file.name != LOCK:
            file.unlink()
    noted.write_text(written)


def part_file(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"{number:06}.npz"


def save_part(path: Path, part: Part) -> None:
    """Writes a part, whole or not at all; raises OSError."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, **part._asdict())
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def has_part(path: Path) -> bool:
    """Whether a part is there, and not truncated."""
    try:
        with np.load(path) as arrays:
            return set(arrays.files) == set(Part._fields)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def join(folder: Path, count: int, out: Path, tokenizer: Tokenizer, files: Sequence[tuple[str, int]]) -> int:
    """Writes the token file of `count` parts, one of them in memory at a time; returns the number of empty documents.

    Raises:
      ConfigError: there is no document.
    """
    paths = [part_file(folder, number) for number in range(count)]
    offset, text_bytes, empty = 0, 0, 0
    ends, firsts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for path in paths:
        with np.load(path) as part:
            ends.append(part["document_ends"] + offset)
            firsts.append(part["first_targets"] + offset)
            offset += len(part["tokens"])
            text_bytes, empty = text_bytes + int(part["text_bytes"]), empty + int(part["empty"])
    if not offset:
        raise ConfigError(f"all {empty} documents are empty; give some with text in them")
    columns = {
        "tokens": Column(dtype_of(tokenizer.vocab), offset, (_tokens(path) for path in paths)),
        "document_ends": _column(np.concatenate(ends)),
        "first_targets": _column(np.concatenate(firsts)),
        "token_bytes": _column(tokenizer.token_bytes),
    }
    about = About(tokenizer.fingerprint, tokenizer.end_text, text_bytes, list(files))
    write_token_file(out, about, columns)
    return empty


def _tokens(path: Path) -> np.ndarray:
    with np.load(path) as part:
        return part["tokens"]


def _column(array: np.ndarray) -> Column:
    return Column(array.dtype, len(array), [array])


def remove(folder: Path) -> None:
    """Removes the parts and, where the system can while it is locked, their folder."""
    for file in folder.iterdir():
        file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
