"""Texts, opened: each source read as it is, or encoded once, and divided into splits.

One plain text whose bytes are the tokens, and a token file, are read where they lie. Everything else (folders and
globs, JSONL, gzip, any other tokenizer) is encoded into a token file in the user's cache folder first. A source is
divided into splits by size, unless each of these has files of its own.
"""

import fcntl
import glob
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError, DataConfig, gather_problems, parts_of
from lss_jax.data.aclsum import papers
from lss_jax.data.documents import Fields, files_of, is_jsonl
from lss_jax.data.encoding import encode
from lss_jax.data.packing import Stream, documents_between, separated, split_ends, undivided
from lss_jax.data.sources import (
    SPLITS,
    FileSource,
    Part,
    check_file,
    enwik8,
    open_splits,
    splits_of,
    stdlib_files,
    text,
)
from lss_jax.data.text import BYTES
from lss_jax.data.token_file import TokenFile, is_token_file
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.runtime.distributed import is_first
from lss_jax.storage.workdir import write_whole

log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """Opened data."""

    streams: dict[str, list[Stream]]  # by split: one per source
    token_bytes: np.ndarray | None  # bytes of text that each token of the vocabulary stands for; None: one each


ACLSUM = "aclsum"


def are_documents(config: DataConfig) -> bool:
    """Whether texts are documents: unless they are one plain text without a separator."""
    return bool(config.separator) or not _is_one_text(config)


def check_texts(config: DataConfig) -> None:
    """Raises a ConfigError for files that are not there, a line each; opens nothing."""
    gather_problems(*(lambda part=part: _check(part, config) for part in _named(config)), lambda: _check_name(config))


def open_texts(config: DataConfig) -> Corpus:
    """Opens all sources; what has to be encoded is encoded now, unless that was done before.

    Raises:
      ConfigError: a source cannot be opened or encoded, is too short, or was encoded by another tokenizer.
    """
    if _is_one_text(config):
        parts = open_splits(config)
        return Corpus(
            {name: [Stream(p, separated(p.mapped(), config.separator), None)] for name, p in parts.items()}, None
        )
    check_texts(config)
    of_splits = _parts_of_splits(config)
    if of_splits is None:
        sources = [_opened(part, config) for part in (_named(config) or [""])]
        splits = [_divided(source, config) for source in sources]
        streams = {name: [of_source[name] for of_source in splits] for name in SPLITS}
    else:
        opened = {name: [_opened(part, config) for part in parts] for name, parts in of_splits.items()}
        sources = [source for of_split in opened.values() for source in of_split]
        streams = {
            name: [_stream(Part(source, 0, source.size), config) for source in of_split]
            for name, of_split in opened.items()
        }
        _check_length(streams["train"], config)
    encoded = [source for source in sources if isinstance(source, TokenFile)]
    return Corpus(streams, None if config.tokenizer == BYTES else encoded[0].token_bytes)


def _parts_of_splits(config: DataConfig) -> dict[str, list[str]] | None:
    """The sources of each split, if splits have some of their own."""
    if config.source == ACLSUM:
        return {name: [name] for name in SPLITS}
    if not config.valid_path:
        return None
    return {"train": config.parts, "valid": parts_of(config.valid_path), "test": parts_of(config.test_path)}


def _named(config: DataConfig) -> list[str]:
    """The paths that the config names, each a source."""
    if config.source == "text":
        return [part for path in (config.path, config.valid_path, config.test_path) for part in parts_of(path) if part]
    return [config.path] if config.path else []


def _is_one_text(config: DataConfig) -> bool:
    parts = _named(config)
    is_text = config.source != "text" or all(map(_is_plain, parts))
    return config.tokenizer == BYTES and len(parts) < 2 and is_text and _parts_of_splits(config) is None


def _is_plain(part: str) -> bool:
    """Whether a part of `data.path` is a file of plain text, or would be if it existed."""
    path = Path(part).expanduser()
    is_other = is_jsonl(path) or path.name.lower().endswith(".gz") or path.is_dir() or is_token_file(path)
    return not is_other and (path.is_file() or not glob.has_magic(part))


def _check(part: str, config: DataConfig) -> None:
    if config.source != "text" or _is_plain(part):
        return check_file(part)
    _found(part)


def _check_name(config: DataConfig) -> None:
    if config.tokenizer != BYTES and not Path(config.tokenizer).expanduser().is_file():
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r} is not a file; give the path of a tokenizer.json, or {BYTES!r}"
        )


def _found(part: str) -> list[Path]:
    try:
        return files_of([part])
    except ConfigError as error:
        raise ConfigError(f"data.path: {error}") from error


def _opened(part: str, config: DataConfig) -> TokenFile | FileSource:
    """A source, from its part of `data.path`; empty where the config's source needs no path."""
    if config.source == "stdlib":
        return _encoded(stdlib_files(), config)
    if config.source == "enwik8":
        return _encoded([enwik8(part).path], config)
    if config.source == ACLSUM:
        return _encoded([_papers_file(part)], config)
    if is_token_file(Path(part).expanduser()):
        file = TokenFile(Path(part).expanduser())
        _check_tokenizer(file, config)
        return file
    if config.tokenizer == BYTES and _is_plain(part):
        return text(part)
    return _encoded(_found(part), config)


def _papers_file(split: str) -> Path:
    """The papers of a split as a file in the cache folder, made there if it is not yet."""
    content, out = papers(split), _cached("aclsum", f"{split}.jsonl")
    with _turn(out):
        if not out.is_file() or out.read_bytes() != content:
            write_whole(out, content)
    return out


def _check_tokenizer(file: TokenFile, config: DataConfig) -> None:
    """Raises a ConfigError for a token file that was encoded by another tokenizer than the config's."""
    tokenizer = load_tokenizer(config.tokenizer)
    expected = tokenizer.fingerprint
    if file.tokenizer == expected and file.end != tokenizer.end_text:
        log.warning(
            "documents in token file %s end with %r, but generated text ends with %r, the end token of %s",
            *(file.path, file.end, tokenizer.end_text, config.tokenizer),
        )
    if file.tokenizer != expected:
        maker = file.tokenizer if file.tokenizer == BYTES else f"the tokenizer with SHA-256 {file.tokenizer[:12]}"
        other = "" if expected == BYTES else f", whose SHA-256 is {expected[:12]}"
        raise ConfigError(
            f"data.path: token file {str(file.path)!r} was encoded by {maker}, but data.tokenizer is "
            f"{config.tokenizer!r}{other}; give that tokenizer, or encode the text again with python -m "
            f"lss_jax.tokenize --tokenizer {config.tokenizer}"
        )


def _encoded(files: Sequence[Path], config: DataConfig) -> TokenFile:
    """The files as a token file in the cache folder, made there if it is not yet; processes of a host take turns."""
    tokenizer, (fields, separator) = load_tokenizer(config.tokenizer), _fields_and_separator(files, config)
    recipe = tokenizer.fingerprint, separator, fields, [_seen(file) for file in files]
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()
    out = _cached("tokens", digest[:32])
    with _turn(out):
        if out.is_file():
            return _kept(out)
        return encode(files, out, tokenizer, fields=fields, separator=separator, progress=is_first())


def _cached(folder: str, name: str) -> Path:
    """The path of a file in a folder of the user's cache."""
    import pooch  # imported late: in a notebook the import itself warns about progress bars

    return Path(pooch.os_cache("lss_jax")) / folder / name


def _kept(out: Path) -> TokenFile:
    """A file that was encoded before."""
    try:
        return TokenFile(out)
    except ConfigError as error:
        raise ConfigError(f"{error}; it is only kept to save time: remove it, and it is made again") from error


@contextmanager
def _turn(out: Path) -> Iterator[None]:
    """Waits while another process of this host makes the file `out`, whose folder is made if it is not there.

    Raises:
      ConfigError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_name(f"{out.name}.turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ConfigError(
            f"{out.parent}, where encoded text is kept, cannot be written to ({error.strerror}); set XDG_CACHE_HOME to "
            f"a folder that can, or encode the text elsewhere with python -m lss_jax.tokenize"
        ) from error


def _fields_and_separator(files: Sequence[Path], config: DataConfig) -> tuple[Fields, str]:
    """What the config says of files of this kind: plain text has no prompts, and is learned whole; JSONL no separator.

    Raises:
      ConfigError: there are prompts, and only some of the files are JSONL.
    """
    are_jsonl = set(map(is_jsonl, files))
    if config.prompt_field and len(are_jsonl) == 2:
        raise ConfigError(
            f"data.path: {files[0].parent} has both JSONL and plain text, in which there is no data.prompt_field="
            f"{config.prompt_field!r}; give them as two parts with a comma between, as in 'chats/*.jsonl, books/*.txt'"
        )
    prompts = (config.prompt_field, config.answer_field) if True in are_jsonl else ("", "")
    return Fields(config.field, *prompts), config.separator if False in are_jsonl else ""


def _seen(file: Path) -> tuple[str, int, int]:
    """A file by its path, size and time."""
    seen = file.stat()
    return str(file.absolute()), seen.st_size, seen.st_mtime_ns


def _divided(source: TokenFile | FileSource, config: DataConfig) -> dict[str, Stream]:
    """The splits of a source: of a token file between documents, if it can be."""
    if isinstance(source, TokenFile):
        named, ends = (f"token file {str(source.path)!r}", "tokens"), split_ends(source)
    else:
        named, ends = (f"data.path={str(source.path)!r}", "bytes"), None
    return {name: _stream(part, config) for name, part in splits_of(source, *named, config.seq_len, ends).items()}


def _stream(part: Part, config: DataConfig) -> Stream:
    """A part of a source beside others, with its documents: plain text without a separator is one."""
    if isinstance(part.source, TokenFile):
        return Stream(part, documents_between(part.source, part.start, part.stop), None)
    return Stream(part, separated(part.mapped(), config.separator) or undivided(), None)


def _check_length(streams: Sequence[Stream], config: DataConfig) -> None:
    """Raises a ConfigError for a source that is shorter than one training window."""
    for stream in streams:
        if len(stream.tokens) < config.seq_len + 1:
            raise ConfigError(
                f"data.path={config.path!r}: a part has {len(stream.tokens)} tokens, but one window takes data.seq_len "
                f"+ 1 = {config.seq_len + 1}; use a longer file or a smaller data.seq_len"
            )
