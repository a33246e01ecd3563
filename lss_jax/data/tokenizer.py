"""Subword tokenizers: a `tokenizer.json` of Hugging Face, or one trained here."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lss_jax.config.genome_rules import BASES
from lss_jax.config.schema import ConfigError
from lss_jax.data.bases import BaseText
from lss_jax.data.text import BYTES, ByteText, Tokenizer
from lss_jax.data.token_bytes import SPACE, bytes_of_tokens

END = "<|endoftext|>"  # ends documents, unless a tokenizer_config.json names another token
CONFIG = "tokenizer_config.json"
LETTERS = "xA0"  # one of which every tokenizer knows, also one of genomes or of digits
OF_LETTERS: dict[str, Tokenizer] = {BYTES: ByteText(), BASES: BaseText()}  # by name, those that need no file
LINE_FEED = "\n"  # before a text that goes on, for tokenizers that begin each text with a space


class JsonTokenizer:
    """A `tokenizer.json`, read by the library `tokenizers`: byte-level, or of SentencePiece (see `token_bytes`).

    Special tokens that are written in a text are read as such, as `transformers` does. What its post-processor puts
    before a text is `first`; what it puts behind is left out.

    Args:
      path: of the file.
      end: the token that ends documents; None: the `eos_token` of a tokenizer_config.json beside the file, else `END`
        if there is such a token, else none.

    Raises:
      ConfigError: the file cannot be read, is of a kind whose tokens do not stand for bytes, or has no such end.
    """

    items = "tokens"
    unlearned: int | None = None

    def __init__(self, path: str, end: str | None = None):
        self.name, file = path, Path(path).expanduser()
        written = _contents(file)
        self.fingerprint = hashlib.sha256(written).hexdigest()
        self._tokenizer = _tokenizer_of(path, written)
        spec = json.loads(written)
        self._bytes, self._written = bytes_of_tokens(path, self._tokenizer, spec)
        self._knows_unknown = any(spec["model"].get(key) is not None for key in ("unk_token", "unk_id"))
        self.vocab = len(self._bytes)
        self.token_bytes = np.array([len(part) for part in self._bytes], np.uint16)
        self._written_bytes = np.array([len(part) for part in self._written])
        self.end_text = self._end_text(file) if end is None else end
        self.end = self._token(self.end_text) if self.end_text else None
        self.first, self._begins_with_space = self._beginning()
        self._line_feed = self._plain([LINE_FEED])[0]
        self._sound: set[str] = set()  # characters that are known to have tokens

    def tokens_of(self, text: bytes) -> np.ndarray:
        """The tokens of a text, int32, from its `first` ones on.

        Raises:
          ConfigError: the text is not UTF-8, or has characters without a token.
        """
        return np.concatenate((self.first, *self.encode([text], [False])))

    def bytes_of(self, token: int) -> bytes:
        return self._bytes[token]

    def encode(self, texts: Sequence[bytes], goes_on: Sequence[bool]) -> list[np.ndarray]:
        """The tokens of many texts, int32, without the `first` ones; some may go on with an earlier text.

        Raises:
          ConfigError: a text is not UTF-8, or has characters without a token.
        """
        decoded = [_decoded(text) for text in texts]
        behind = [self._begins_with_space and goes for goes in goes_on]
        found = self._plain([LINE_FEED * after + text for text, after in zip(decoded, behind, strict=True)])
        found = [self._behind_line_feed(ids) if after else ids for ids, after in zip(found, behind, strict=True)]
        found = [ids if text else ids[:0] for ids, text in zip(found, decoded, strict=True)]
        for text, source, ids in zip(decoded, texts, found, strict=True):
            if not self._knows_unknown and self._written_bytes[ids].sum() < len(source):
                self._check_characters(text)
        return found

    def apart(self, left: bytes, right: bytes) -> bool:
        """Whether two neighbouring texts have the same tokens apart as together, and must have.

        They must if no token has the last byte of the one and the first of the other in it, or if the pre-tokenizer
        divides them, since the words that it makes are encoded one by one.
        """
        try:
            together, before = self.encode([left + right, left], [False, False])
            (behind,) = self.encode([right], [True])
        except ConfigError:
            return False
        return np.array_equal(together, np.concatenate((before, behind))) and (
            not self._within_tokens[left[-1], right[0]] or self._divides(_decoded(left), _decoded(right))
        )

    def _plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def _behind_line_feed(self, ids: np.ndarray) -> np.ndarray:
        count = len(self._line_feed)
        if not np.array_equal(ids[:count], self._line_feed):
            raise ConfigError(
                f"data.tokenizer={self.name!r} begins every text with a space, and joins a text that goes on to a line "
                f"feed before it; use a tokenizer without add_prefix_space"
            )
        return ids[count:]

    def _beginning(self) -> tuple[np.ndarray, bool]:
        """What the post-processor puts before a text, and whether there is a space before it besides."""
        known = next((letter for letter in LETTERS if len(self._plain([letter])[0])), LETTERS[0])
        plain, processed = (self._tokenizer.encode(known, add_special_tokens=special).ids for special in (False, True))
        starts = (s for s in range(len(processed)) if processed[s : s + len(plain)] == plain)
        return np.array(processed[: next(starts, 0)], np.int32), sum(len(self._bytes[t]) for t in plain) > 1

    def _end_text(self, file: Path) -> str:
        beside = file.with_name(CONFIG)
        try:
            named = json.loads(beside.read_bytes()).get("eos_token") if beside.is_file() else None
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{beside} cannot be read ({error}); repair it, or take it away") from error
        named = named.get("content") if isinstance(named, dict) else named
        return named or (END if self._tokenizer.token_to_id(END) is not None else "")

    def _token(self, text: str) -> int:
        token = self._tokenizer.token_to_id(text)
        if token is None:
            special = ", ".join(repr(one.content) for one in self._tokenizer.get_added_tokens_decoder().values())
            raise ConfigError(
                f"data.tokenizer={self.name!r} has no token {text!r} that could end documents; its special ones are "
                f"{special or 'none'}"
            )
        return token

    @functools.cached_property
    def _within_tokens(self) -> np.ndarray:
        """Which bytes follow which inside a token, bool `[256, 256]`."""
        text = np.frombuffer(b"".join(self._written), np.uint8)
        inside = np.ones(len(text), bool)
        inside[np.cumsum(self._written_bytes) - 1] = False  # a token's last byte; empty tokens repeat the one before
        pairs = np.zeros((256, 256), bool)
        pairs[text[:-1][inside[:-1]], text[1:][inside[:-1]]] = True
        return pairs

    def _divides(self, left: str, right: str) -> bool:
        before, normalizer = self._tokenizer.pre_tokenizer, self._tokenizer.normalizer
        if before is None or normalizer is not None:
            return False  # offsets would be those of the normalized text
        return any(stop == len(left) for _, (_, stop) in before.pre_tokenize_str(left + right))

    def _check_characters(self, text: str) -> None:
        """Raises a ConfigError if a character has no token; the library leaves it out."""
        normalizer, lost = self._tokenizer.normalizer, []
        for character in sorted(set(text) - self._sound):
            normal = normalizer.normalize_str(character) if normalizer else character
            (ids,) = self._plain([character])
            if self._written_bytes[ids].sum() < len(normal.replace(SPACE, " ").encode()):
                lost.append(character)
        if lost:
            raise ConfigError(
                f"data.tokenizer={self.name!r} has no token for {', '.join(map(repr, lost[:10]))}, and none for "
                f"unknown ones; train it with the alphabet of all bytes, as python -m lss_jax.tokenize --train does"
            )
        self._sound |= set(text)


def load_tokenizer(name: str, end: str | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes", "bases", or the path of a tokenizer.json.

    Raises:
      ConfigError: as `JsonTokenizer`; or bytes are to have an end token.
    """
    if name not in OF_LETTERS:
        file = Path(name).expanduser()
        return _loaded(name, end, _stamp(file), _stamp(file.with_name(CONFIG)))
    if end:
        raise ConfigError(f"--end={end!r}: {name} have no special tokens; leave it out, or give a tokenizer.json")
    return OF_LETTERS[name]


@functools.lru_cache(maxsize=4)
def _loaded(name: str, end: str | None, *_stamps: Any) -> JsonTokenizer:
    """The tokenizer of files with these stamps, read once: one of 128,256 tokens takes a second."""
    return JsonTokenizer(name, end)


def _stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written to; None if there is none."""
    try:
        seen = file.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_size


def _contents(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={str(file)!r} cannot be read ({error.strerror}); give the path of a tokenizer.json, or "
            f'"bytes"'
        ) from error


def _tokenizer_of(path: str, written: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer: whole texts, and the same tokens each time."""
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(written)
    except Exception as error:  # the library raises nothing more particular
        raise ConfigError(
            f"data.tokenizer={path!r} is no tokenizer.json that tokenizers {tokenizers.__version__} can read "
            f"({error}); give one that transformers has saved, or train one with python -m lss_jax.tokenize --train"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, tokenizers.models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        found = text[error.start : error.start + 4].hex(" ")
        raise ConfigError(
            f"the text is not UTF-8 ({error.reason}, byte {error.start}: {found}), which a tokenizer.json needs; "
            f"convert it to UTF-8"
        ) from error
