"""The bytes that each token of a `tokenizer.json` stands for, whatever tokens are beside it.

There are two kinds of such tokenizers. *Byte-level* ones (GPT-2, Llama 3, Qwen) write each byte as a printable
character. Those of *SentencePiece* (Llama 2, Mistral, T5) write a space as U+2581, and bytes outside of their alphabet
as `<0xAB>`.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from lss_jax.config.schema import ConfigError

SPACE = "\u2581"
BYTE = re.compile("<0x([0-9A-F]{2})>")
SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # as latin-1; GPT-2 writes these as they are


def bytes_of_tokens(
    path: str, tokenizer: tokenizers.Tokenizer, spec: dict[str, Any]
) -> tuple[list[bytes], list[bytes]]:
    """By token, the bytes of text that it stands for, and those by which it is written in a text.

    The two differ for special tokens, which stand for no text, and for the unknown one. A number without a token has
    neither.

    Raises:
      ConfigError: the tokenizer is of a third kind.
    """
    to_bytes, unknown = _kind(path, spec), spec["model"].get("unk_token")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    text = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        text[number] = b"" if token == unknown else to_bytes(token)
    written = [*text]
    for number, added in tokenizer.get_added_tokens_decoder().items():
        written[number] = added.content.encode()
        text[number] = b"" if added.special else written[number]
    return text, written


def _kind(path: str, spec: dict[str, Any]) -> Callable[[str], bytes]:
    """The function from a token as it is written in the file to its bytes."""
    decoders = list(_decoders(spec.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    if kinds == {"ByteLevel"}:
        return _byte_level
    spaces = [d for d in decoders if d["type"] == "Metaspace" or d.get("pattern") == {"String": SPACE}]
    if spaces and kinds <= SENTENCEPIECE:
        return functools.partial(_sentencepiece, fallback="ByteFallback" in kinds)
    raise ConfigError(
        f"data.tokenizer={path!r} is of type {spec['model'].get('type')} with decoders {sorted(kinds) or 'none'}: the "
        f"bytes of its tokens depend on the tokens beside them, or are not known, and then no text can be streamed and "
        f"no bits per byte computed; use a byte-level BPE (GPT-2, Llama 3, Qwen), or one of SentencePiece (Llama 2)"
    )


def _decoders(spec: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if spec is not None and spec["type"] == "Sequence":
        for inner in spec["decoders"]:
            yield from _decoders(inner)
    elif spec is not None:
        yield spec


def _byte_level(token: str) -> bytes:
    table = _bytes_of_characters()
    try:
        return bytes([table[character] for character in token])
    except KeyError:  # as the library does
        return token.encode()


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table: printable bytes are themselves, the others the characters from U+0100 on, in their order."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    return {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _sentencepiece(token: str, *, fallback: bool) -> bytes:
    byte = BYTE.fullmatch(token) if fallback else None
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()
