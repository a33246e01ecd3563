"""Token files and a tokenizer for tests, written without the package."""

import hashlib
import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCAB = 280
Document = tuple[list[int], int]  # its tokens, and how many at its start are given

LENGTHS = [7, 1, 30, 60, 2, 150, 5, 96, 48, 20, 1, 1, 40, 11, 130, 3, 70, 25, 33, 90]
GIVEN = [0, 0, 12, 0, 1, 149, 2, 60, 48, 0, 1, 0, 0, 5, 100, 0, 0, 20, 0, 0]


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of `VOCAB` tokens, the first of which is special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the rain in Spain stays mainly in the plain", "and there are other trains"], trainer
    )
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def documents_of(lengths: list[int], given: list[int], vocab: int = VOCAB, seed: int = 0) -> list[Document]:
    """Documents of random tokens."""
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, vocab, n).tolist(), count) for n, count in zip(lengths, given, strict=True)]


def write_tokens(
    path: Path, documents: list[Document], token_bytes: np.ndarray, tokenizer: Path | None, **changes: str
) -> Path:
    """A token file of these documents; without a tokenizer each token is a byte."""
    lengths = np.array([len(tokens) for tokens, _ in documents])
    ends = np.cumsum(lengths)
    first_targets = ends - lengths + np.maximum([given for _, given in documents], 1)
    tokens = np.concatenate([tokens for tokens, _ in documents])
    arrays = {
        "tokens": tokens.astype(np.uint8 if len(token_bytes) <= 256 else np.uint16),
        "document_ends": ends.astype(np.int64),
        "first_targets": first_targets.astype(np.int64),
        "token_bytes": token_bytes.astype(np.uint16),
    }
    about = {
        "format": "lss_jax tokens 1",
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer else "bytes",
        "end": "",
        "text_bytes": str(int(token_bytes.take(tokens, mode="clip").sum())),
        "files": json.dumps([["text", 1]]),
    }
    save_file(arrays, path, about | changes)
    return path


def whole(documents: list[Document]) -> np.ndarray:
    """All tokens, one document after the other."""
    return np.concatenate([tokens for tokens, _ in documents])
