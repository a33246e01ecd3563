"""Trains a byte-level BPE on documents, in the form that `tokenizers` and `transformers` read."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lss_jax.config.schema import ConfigError
from lss_jax.data.documents import Block
from lss_jax.data.pieces import pieces
from lss_jax.data.tokenizer import CONFIG, END
from lss_jax.storage.workdir import write_whole

SMALLEST = 257  # all bytes and END
LARGEST = 2**24
SETTINGS = {  # by which AutoTokenizer of `transformers` opens the folder
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(blocks: Iterable[Block], size: int, out: Path, *, progress: bool) -> int:
    """Trains a BPE of up to `size` tokens, and writes it to `out`, with a tokenizer_config.json beside it.

    Words are those of GPT-2 (Radford et al. 2019), and the alphabet is all bytes, so that every text has tokens. The
    first token is `END`. Returns the number of tokens: fewer if no further pair of tokens occurs twice.

    Raises:
      ConfigError: the size cannot be, the files cannot be written, or there is another tokenizer's config beside them.
    """
    if not SMALLEST <= size <= LARGEST:
        raise ConfigError(f"--train={size} must be from {SMALLEST} (all bytes, and {END}) to {LARGEST} tokens")
    config, written = out.with_name(CONFIG), json.dumps(SETTINGS, indent=2) + "\n"
    _check_free(config, written)
    _check_writable(out)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_texts(blocks), trainer)
    try:
        for path, content in ((config, written), (out, tokenizer.to_str(pretty=True) + "\n")):
            write_whole(path, content)
    except OSError as error:
        raise _unwritable(out, error.strerror) from error
    return tokenizer.get_vocab_size()


def _texts(blocks: Iterable[Block]) -> Iterator[str]:
    """The documents and their prompts, long ones divided at words."""
    for piece in pieces(blocks, lambda left, right: True):
        yield from (text.decode() for text in (piece.prompt, piece.text) if text)


def _check_free(config: Path, written: str) -> None:
    try:
        taken = config.exists() and config.read_text() != written
    except (OSError, ValueError):
        taken = True
    if taken:
        raise ConfigError(f"{config} is there already, of another tokenizer; choose an --out in another folder")


def _check_writable(out: Path) -> None:
    """Raises a ConfigError for a place that cannot be written to: before the work, and not after it."""
    if out.is_dir():
        raise _unwritable(out, os.strerror(errno.EISDIR))
    if not out.parent.is_dir():
        raise _unwritable(out, os.strerror(errno.ENOENT))
    if not os.access(out.parent, os.W_OK):
        raise _unwritable(out, os.strerror(errno.EACCES))


def _unwritable(out: Path, why: str | None) -> ConfigError:
    return ConfigError(f"{out} cannot be written ({why}); choose another --out")
