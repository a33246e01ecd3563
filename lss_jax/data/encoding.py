"""Encodes documents once, into a token file: in parallel, in bounded memory, and resumable.

The text is read in order and divided into parts of about `PART` bytes, whatever the number of threads. Each part is
encoded and written to a file of its own, in the folder OUT.parts; in the end they are joined. After an interruption all
text is read again, to divide it in the same way, but only what is missing is encoded. The threads are the library's
own: as fast as processes, as measured, without a copy of the text or of the tokenizer for each.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lss_jax.config.schema import ConfigError, RunError
from lss_jax.data import parts
from lss_jax.data.documents import Documents, Fields
from lss_jax.data.parts import Part
from lss_jax.data.pieces import Piece, pieces
from lss_jax.data.text import Tokenizer
from lss_jax.data.token_file import TokenFile, dtype_of

PART = 2**24  # bytes of text
BATCH = 2**22  # bytes that the library gets at a time
HANDS = 2  # parts in the making: while the library encodes one, another is unpacked or written
VERSION = 1  # of the parts: a change of how text is divided makes older ones useless

log = logging.getLogger("lss_jax")


def encode(
    files: Sequence[Path],
    out: Path,
    tokenizer: Tokenizer,
    *,
    fields: Fields,
    separator: str,
    progress: bool,
    part_bytes: int = PART,
) -> TokenFile:
    """Encodes the documents of `files` into the token file `out`, and opens it.

    What is interrupted leaves its finished parts in the folder OUT.parts. The same call goes on with them if the
    tokenizer and the files, by size and time, are the same.

    Raises:
      ConfigError: something cannot be encoded, or `out` cannot be written; then no part is left.
      RunError: another process is writing `out`, the disk is full, or the files have changed meanwhile.
    """
    if out.is_dir() or out.resolve() in {file.resolve() for file in files}:
        raise ConfigError(f"--out={out} is {'a folder' if out.is_dir() else 'one of the files'}; choose another")
    documents = Documents(files, fields, separator)
    with parts.locked_folder(out) as folder:
        try:
            request = _request(files, tokenizer, fields, separator, part_bytes)
            parts.prepare(folder, request)
            groups = _groups(pieces(documents, tokenizer.apart), part_bytes)
            count = _make_parts(folder, groups, tokenizer, documents, _progress(request, progress))
            if _request(files, tokenizer, fields, separator, part_bytes) != request:
                raise RunError(f"files have changed while {out} was made of them; run the same command again")
            sizes = [(name, size) for name, size, _ in request["files"]]
            empty = parts.join(folder, count, out, tokenizer, sizes)
        except ConfigError:
            parts.remove(folder)
            raise
        except OSError as error:
            raise RunError(
                f"{out} cannot be written ({error.strerror}); make room, then the same command goes on with the "
                f"parts in {folder}"
            ) from error
        parts.remove(folder)
    if empty:
        log.warning("%s documents are empty, and are left out", f"{empty:,}")
    return TokenFile(out)


def _request(
    files: Sequence[Path], tokenizer: Tokenizer, fields: Fields, separator: str, part_bytes: int
) -> dict[str, Any]:
    """What decides the content of all parts, as JSON has it."""
    try:
        found = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}); leave it out") from error
    return {
        "files": found,
        "tokenizer": tokenizer.fingerprint,
        "end": tokenizer.end_text,
        "fields": list(fields),
        "separator": separator,
        "part_bytes": part_bytes,
        "version": VERSION,
    }


def _progress(request: dict[str, Any], shown: bool) -> tqdm:
    total = sum(size for _, size, _ in request["files"])
    return tqdm(desc="encoding", total=total, unit="B", unit_scale=True, leave=False, disable=None if shown else True)


def _groups(found: Iterable[Piece], part_bytes: int) -> Iterator[list[Piece]]:
    """Consecutive pieces with `part_bytes` of text or a little more."""
    group, size = [], 0
    for piece in found:
        group.append(piece)
        size += len(piece.prompt) + len(piece.text) + 1  # empty ones take memory too
        if size >= part_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _make_parts(
    folder: Path, groups: Iterable[list[Piece]], tokenizer: Tokenizer, documents: Documents, bar: tqdm
) -> int:
    """Writes the parts that are not there yet, a few at a time; returns the number of all parts."""
    count, stop = 0, threading.Event()
    pending: deque[tuple[Future[None], int]] = deque()

    def finish(most: int) -> None:
        while len(pending) > most:
            made, position = pending.popleft()
            made.result()
            bar.update(position - bar.n)

    with ThreadPoolExecutor(HANDS) as pool, bar:
        try:
            for group in groups:
                made = pool.submit(_make_part, parts.part_file(folder, count), group, tokenizer, stop)
                pending.append((made, documents.position))
                count += 1
                finish(HANDS)
            finish(0)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return count


def _make_part(path: Path, group: list[Piece], tokenizer: Tokenizer, stop: threading.Event) -> None:
    if not parts.has_part(path):
        parts.save_part(path, _encoded(group, tokenizer, stop))


def _encoded(group: list[Piece], tokenizer: Tokenizer, stop: threading.Event) -> Part:
    """The tokens of a group; a document begins with the tokenizer's `first` tokens and ends with its `end`."""
    found, length = [np.zeros(0, np.int32)], 0
    ends, firsts, text_bytes, empty = [], [], 0, 0
    encoded = _tokens(group, tokenizer, stop)
    for piece in group:
        prompt, answer = next(encoded)
        if piece.begins and piece.ends and not piece.text:
            empty += 1
            continue
        start, own = length, [prompt, answer]
        if piece.begins:
            own = [tokenizer.first, *own]
            firsts.append(start + max(len(tokenizer.first) + len(prompt), 1))
        if piece.ends and tokenizer.end is not None and (not len(answer) or answer[-1] != tokenizer.end):
            own.append(np.array([tokenizer.end], np.int32))
        length += sum(map(len, own))
        if piece.ends:
            ends.append(length)
        if piece.begins and length == start:
            raise ConfigError(
                f"{piece.where}: the text has no tokens under data.tokenizer={tokenizer.name!r}; leave it out"
            )
        found += own
        text_bytes += len(piece.prompt) + len(piece.text)
    tokens = np.concatenate(found).astype(dtype_of(tokenizer.vocab))
    return Part(tokens, np.array(ends, np.int64), np.array(firsts, np.int64), np.array(text_bytes), np.array(empty))


def _tokens(group: list[Piece], tokenizer: Tokenizer, stop: threading.Event) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each piece's prompt, if any, and text."""
    for batch in _groups(group, BATCH):
        if stop.is_set():
            raise CancelledError
        texts = [text for piece in batch for text in (piece.prompt, piece.text)]
        goes_on = [after for piece in batch for after in (False, bool(piece.prompt) or not piece.begins)]
        try:
            found = iter(tokenizer.encode(texts, goes_on))
        except ConfigError:
            for piece in batch:
                _name_the_piece(piece, tokenizer)
            raise
        yield from zip(found, found, strict=True)


def _name_the_piece(piece: Piece, tokenizer: Tokenizer) -> None:
    try:
        tokenizer.encode([piece.prompt, piece.text], [False, False])
    except ConfigError as error:
        raise ConfigError(f"{piece.where}: {error}") from error
