"""Documents from many files: plain text and JSONL, gzipped or not, streamed block by block.

A file is plain text, and then one document or several that end with a separator, unless its name ends with `.jsonl` or
`.ndjson`: then each line is an object, and a document. Everything must be UTF-8.
"""

import codecs
import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from lss_jax.config.schema import ConfigError
from lss_jax.data.files import readable

BLOCK = 2**18  # bytes of a plain text that are read at a time
JSONL = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".md", *JSONL)  # what is taken from a folder, also with .gz behind it
Binary = IO[bytes] | gzip.GzipFile


class Fields(NamedTuple):
    """The names of the fields of a JSONL object: of its text, or, if there are such, of its prompt and its answer."""

    text: str
    prompt: str
    answer: str


class Block(NamedTuple):
    """The next bytes of a document, all of them UTF-8 together; the last block of a document `ends` it."""

    text: bytes
    prompt: bytes  # before the first block of an answer, and not to be learned
    ends: bool
    where: str  # where the document begins, for messages


def files_of(patterns: Iterable[str], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that any of the patterns names, sorted by name and each once.

    A pattern is a file; a folder, of which all with these suffixes are taken, at any depth, but nothing hidden; or a
    glob, in which `**` stands for any folders.

    Raises:
      ConfigError: patterns that match nothing, a line each; or there is none.
    """
    found: dict[Path, Path] = {}  # by where links lead
    problems = []
    for pattern in patterns:
        files = _matches(Path(pattern).expanduser(), tuple(suffixes))
        found = {file.resolve(): file for file in files} | found
        if not files:
            problems.append(
                f"{pattern!r} matches no file; give files, globs, or folders with {', '.join(suffixes)} files in them, "
                f"gzipped (.gz) or not"
            )
    if problems or not found:
        raise ConfigError("\n".join(problems) or "there are no files; give files, folders or globs")
    return sorted(found.values())


def _matches(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        return [file for file in below if _unzipped(file).endswith(suffixes) and file.is_file()]
    return [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]


def _unzipped(path: Path) -> str:
    """The name of a file, in lower case, without .gz."""
    return path.name.lower().removesuffix(".gz")


def is_jsonl(path: Path) -> bool:
    """Whether a file is by its name JSONL, gzipped or not."""
    return _unzipped(path).endswith(JSONL)


class Documents:
    """Iterates over the documents of files, in their order, as blocks; a line of JSONL is the most it holds at a time.

    `position` is the number of bytes of all files that have been read, for progress.

    Raises:
      ConfigError: a file cannot be read, is empty or is not what its name says; it names the file and the line.
    """

    def __init__(self, files: Sequence[Path], fields: Fields, separator: str):
        self._files, self._fields, self._separator = files, fields, separator.encode()
        self.position = 0

    def __iter__(self) -> Iterator[Block]:
        if self._separator and all(is_jsonl(path) for path in self._files):
            raise ConfigError(
                f"the separator {self._separator.decode()!r} has no use in JSONL files, where a line is a document; "
                f"leave it out"
            )
        before = 0
        for path in self._files:
            with readable(path), path.open("rb") as raw:
                for block in self._blocks(path, raw):
                    self.position = before + raw.tell()
                    yield block
                before += os.fstat(raw.fileno()).st_size

    def _blocks(self, path: Path, raw: IO[bytes]) -> Iterator[Block]:
        file: Binary = gzip.GzipFile(fileobj=raw, mode="rb") if path.suffix.lower() == ".gz" else raw
        if _unzipped(path).endswith(".json"):
            raise ConfigError(
                f"{path} is by its name neither plain text nor JSONL; name it .jsonl if it has an object per line, "
                f"else .txt"
            )
        blocks = self._of_lines(path, file) if is_jsonl(path) else self._of_text(path, file)
        empty = True
        for block in blocks:
            empty = False
            yield block
        if empty:
            raise ConfigError(f"{path} is empty, without any document; leave it out")

    def _of_text(self, path: Path, file: Binary) -> Iterator[Block]:
        """The documents of a plain text, each with the separator that ends it."""
        if self._fields.prompt:
            raise ConfigError(
                f"{path} is plain text, which has no field {self._fields.prompt!r}; give JSONL files with prompts and "
                f"answers, or ask for a text"
            )
        line, where, ends, separated = 1, f"{path}, line 1", True, False
        for text, ends in _divided(_utf8(path, file), self._separator):
            yield Block(text, b"", ends, where)
            line, separated = line + text.count(b"\n"), separated or ends
            where = f"{path}, line {line}" if ends else where
        if not ends:
            yield Block(b"", b"", True, where)
        if self._separator and not separated:
            raise ConfigError(
                f"{path} does not have the separator {self._separator.decode()!r} in it; give a string that ends "
                f"documents (in a shell $'\\n\\n' is two line feeds), or none if each file is a document"
            )

    def _of_lines(self, path: Path, file: Binary) -> Iterator[Block]:
        """The documents of a JSONL file, one per line; blank lines are none."""
        fields = self._fields
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            item = _object(line, where)
            prompt = _field(item, fields.prompt, where) if fields.prompt else b""
            if fields.prompt and type(item.get(fields.answer)) in (int, bool):
                item[fields.answer] = json.dumps(item[fields.answer])  # a label
            yield Block(_field(item, fields.answer if fields.prompt else fields.text, where), prompt, True, where)


def _divided(chunks: Iterable[bytes], separator: bytes) -> Iterator[tuple[bytes, bool]]:
    """Pieces of a text, each with whether a separator ends it."""
    rest, kept = b"", max(len(separator) - 1, 0)  # perhaps the beginning of a separator
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        yield from ((part + separator, True) for part in whole)
        if len(rest) - kept >= BLOCK:
            yield rest[: len(rest) - kept], False
            rest = rest[len(rest) - kept :]
    if rest:
        yield rest, False


def _utf8(path: Path, file: Binary) -> Iterator[bytes]:
    """Reads a file piece by piece, each of whole characters."""
    rest, line = b"", 1
    while True:
        read = file.read(BLOCK)
        data = rest + read
        try:
            _, length = codecs.utf_8_decode(data, "strict", not read)
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            raise _not_utf8(f"{path}, line {line}", error) from error
        if not read:
            return
        yield data[:length]
        rest, line = data[length:], line + data[:length].count(b"\n")


def _object(line: bytes, where: str) -> dict:
    """The object of a line of JSONL."""
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON ({error}); each line of a JSONL file is one object") from error
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: is JSON of type {type(item).__name__}; each line of a JSONL file is one object")
    return item


def _field(item: dict, name: str, where: str) -> bytes:
    """The text in a field of an object."""
    if name not in item:
        has = ", ".join(map(repr, item)) or "none"
        raise ConfigError(f"{where}: has no field {name!r}, but {has}; name the field that holds the text")
    if not isinstance(item[name], str):
        raise ConfigError(f"{where}: field {name!r} is {type(item[name]).__name__}, not a string; give text")
    try:
        return item[name].encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: field {name!r} has half a surrogate pair ({error}); write it whole") from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> ConfigError:
    found = error.object[error.start : error.start + 4]
    return ConfigError(f"{where}: is not UTF-8 ({error.reason}, at bytes {found.hex(' ')}); convert the file to UTF-8")
