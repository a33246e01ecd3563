"""Tokenizers of the kinds that models have, made on the spot, and texts that are hard for them."""

import json
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lss_jax.data.documents import Block
from lss_jax.data.tokenizer_training import train_tokenizer

CORPUS = (
    """The cat sat on the mat, and the cats of the other mats sat there too.
It's 1,234 metres to the café; naïve Zoë walked 56789 of them.\n\n\tif x == 10:\n\t\treturn "mat"\n
    Das Maß aller Dinge:   spaces, more spaces   and line feeds.\n\n\n\n\tthe\n\n\n日本語のテキスト。"""
    * 4
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = st.lists(
    st.sampled_from(
        ["the", "cat", " ", "  ", "\n", "\n\n", "\t", "\r\n", ".", "é", "日本", "12345", "\u00a0", "x", "\u2581"]
    ),
    min_size=25,
    max_size=120,
).map("".join)


def blocks(text: str = CORPUS) -> list[Block]:
    return [Block(text.encode(), b"", True, "here")]


def trained(folder: Path, size: int = 400) -> str:
    """A byte-level BPE as it is trained here."""
    train_tokenizer(blocks(), size, folder / "tokenizer.json", progress=False)
    return str(folder / "tokenizer.json")


def like_llama3(folder: Path) -> str:
    """A byte-level BPE with other words, and a token before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[(special[0], 0)])
    return saved(tokenizer, folder, {"eos_token": {"content": special[1]}})


def like_llama2(folder: Path) -> str:
    """A BPE of SentencePiece: no words, a space before each text, and bytes for what it does not know."""
    learned = Tokenizer(models.BPE())
    words = ["\u2581" + word for word in CORPUS.split() if word.isascii()]
    learned.train_from_iterator(words, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(set(model["vocab"]) | {"\u2581"}, key=lambda token: model["vocab"].get(token, -1))
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return saved(tokenizer, folder, {"eos_token": "</s>"})


def like_t5(folder: Path) -> str:
    """A Unigram of SentencePiece, whose words begin with a space and lose line feeds."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.split("\n"), trainer)
    return saved(tokenizer, folder, {"eos_token": "</s>"})


def without_an_alphabet(folder: Path) -> str:
    """A byte-level BPE that knows two letters."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return saved(tokenizer, folder)


def saved(tokenizer: Tokenizer, folder: Path, config: dict | None = None) -> str:
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


KINDS = {"trained here": trained, "llama 3": like_llama3, "llama 2": like_llama2, "t5": like_t5}
