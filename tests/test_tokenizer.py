"""Tokenizers: their tokens are the library's, their bytes the text, and long texts are encoded in pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizer_cases import CORPUS, KINDS, TEXTS, blocks, saved, trained, without_an_alphabet
from tokenizers import Tokenizer, decoders, models

from lss_jax.config.schema import ConfigError
from lss_jax.data import pieces
from lss_jax.data.documents import Block
from lss_jax.data.text import ByteText
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {kind: make(tmp_path_factory.mktemp("tokenizer")) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def loaded(paths):
    return {kind: load_tokenizer(path) for kind, path in paths.items()}


def text_of(tokenizer, tokens) -> bytes:
    return b"".join(tokenizer.bytes_of(int(token)) for token in tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_library(paths, loaded, kind):
    library = Tokenizer.from_file(paths[kind])
    for text in (CORPUS, "x", " x", "\n\nx", "<|endoftext|>x", "\u2581"):
        np.testing.assert_array_equal(loaded[kind].tokens_of(text.encode()), library.encode(text).ids)


@pytest.mark.parametrize("kind", ["trained here", "llama 3", "llama 2"])
@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_bytes_of_tokens_are_the_text_and_as_many_as_announced(loaded, kind, text):
    tokenizer, text = loaded[kind], text.replace("\u2581", "")
    tokens = tokenizer.tokens_of(text.encode())
    space = " " if kind == "llama 2" and text else ""
    assert text_of(tokenizer, tokens).decode() == space + text
    assert tokenizer.token_bytes[tokens].sum() == len((space + text).encode())
    assert tokenizer.token_bytes.dtype == np.uint16 and len(tokenizer.token_bytes) == tokenizer.vocab


def test_bytes_of_a_token_do_not_depend_on_the_others(loaded):
    """Two tokens with half a character each, and a space that the library's decoder would leave out."""
    for kind in ("trained here", "llama 2"):
        tokens = loaded[kind].tokens_of("Zürich €".encode())
        assert text_of(loaded[kind], tokens).lstrip().decode() == "Zürich €"
        assert all(isinstance(loaded[kind].bytes_of(int(token)), bytes) for token in range(loaded[kind].vocab))
    assert loaded["llama 2"].bytes_of(3 + 0xAB) == b"\xab"


def test_special_tokens_have_no_bytes_and_end_documents(loaded):
    ends = {kind: (one.end_text, one.bytes_of(one.end)) for kind, one in loaded.items()}
    assert ends == {
        "trained here": ("<|endoftext|>", b""),
        "llama 3": ("<|end_of_text|>", b""),
        "llama 2": ("</s>", b""),
        "t5": ("</s>", b""),
    }
    assert {kind: one.first.tolist() for kind, one in loaded.items()} == {
        "trained here": [],
        "llama 3": [0],
        "llama 2": [1],
        "t5": [],
    }


def test_the_end_can_be_named_and_must_be_a_token(paths):
    assert load_tokenizer(paths["llama 3"], "<|begin_of_text|>").end == 0
    with pytest.raises(
        ConfigError, match=r"has no token '</s>' that could end documents; its special ones are '<\|begin"
    ):
        load_tokenizer(paths["llama 3"], "</s>")
    with pytest.raises(ConfigError, match="bytes have no special tokens"):
        load_tokenizer("bytes", "</s>")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_pieces_have_the_tokens_of_the_whole(loaded, kind, text):
    check_pieces(loaded[kind], text)


def check_pieces(tokenizer, text: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 8)
        patch.setattr(pieces, "CONTEXT", 24)
        parts = [text.encode()[start : start + 50] for start in range(0, len(text.encode()), 50)]
        stream = [Block(part, b"", False, "here") for part in parts] + [Block(b"", b"", True, "here")]
        found = list(pieces.pieces(stream, tokenizer.apart))
    assert b"".join(piece.text for piece in found) == text.encode()
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    encoded = tokenizer.encode([piece.text for piece in found], [not piece.begins for piece in found])
    np.testing.assert_array_equal(np.concatenate((tokenizer.first, *encoded)), tokenizer.tokens_of(text.encode()))
    return len(found)


def test_long_texts_are_divided_by_every_tokenizer_and_not_within_a_word(loaded):
    for kind in ("trained here", "llama 3", "llama 2"):
        assert check_pieces(loaded[kind], CORPUS) > 20, kind
    assert check_pieces(ByteText(), CORPUS) > 20
    assert check_pieces(loaded["trained here"], "x" * 500) == 1


def test_a_piece_is_no_longer_than_it_must_be():
    lines = (b"a line of some words\n" * 20_000, b"and more\n" * 9)
    found = list(pieces.pieces([Block(text, b"", text is lines[1], "here") for text in lines], ByteText().apart))
    assert max(len(piece.text) for piece in found[:-1]) <= pieces.PIECE + 2**6 and len(found) == 7


def test_bytes_are_the_tokens_of_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.tokens_of("é\n".encode()).tolist() == [0xC3, 0xA9, 10] and tokenizer.bytes_of(0xC3) == b"\xc3"
    assert (tokenizer.vocab, tokenizer.fingerprint, tokenizer.end) == (256, "bytes", None)
    assert tokenizer.token_bytes.sum() == 256


# Training


def test_training_gives_the_same_tokenizer_each_time_and_all_bytes(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        assert train_tokenizer(blocks(), 300, folder / "tokenizer.json", progress=False) == 300
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(str(tmp_path / "a/tokenizer.json"))
    assert (tokenizer.vocab, tokenizer.end) == (300, 0)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0xF000)]))
    assert text_of(tokenizer, tokenizer.tokens_of(everything.encode())).decode() == everything


def test_a_vocabulary_that_the_text_cannot_fill_is_smaller(tmp_path):
    assert train_tokenizer(blocks("abcabc"), 300, tmp_path / "tokenizer.json", progress=False) < 300


@pytest.mark.parametrize(("size", "told"), [(256, r"--train=256 must be from 257 \(all bytes"), (2**25, "to 16777216")])
def test_sizes_that_cannot_be_are_refused(tmp_path, size, told):
    with pytest.raises(ConfigError, match=told):
        train_tokenizer(blocks(), size, tmp_path / "tokenizer.json", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_config_of_another_tokenizer_is_not_overwritten(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(
        ConfigError, match=r"tokenizer_config.json is there already, of another tokenizer; choose an --out"
    ):
        trained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_broken_document_ends_the_training_with_its_own_error(tmp_path):
    def broken():
        yield from blocks()
        raise ConfigError("a.txt, line 7: is not UTF-8")

    with pytest.raises(ConfigError, match=r"a\.txt, line 7"):
        train_tokenizer(broken(), 300, tmp_path / "tokenizer.json", progress=False)
    assert list(tmp_path.iterdir()) == []


# What is refused


def wordpiece(folder):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return saved(tokenizer, folder)


def test_other_kinds_are_refused_with_the_reason(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is of type WordPiece with decoders \['WordPiece'\]: the bytes of its tokens"
    ):
        load_tokenizer(wordpiece(tmp_path))


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none.json' cannot be read \(No such file or directory\); give the path of"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no tokenizer.json that tokenizers [\d.]+ can read \("):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_characters_without_a_token_are_named(tmp_path):
    tokenizer = load_tokenizer(without_an_alphabet(tmp_path))
    assert tokenizer.tokens_of(b"abba").tolist() == [2, 1, 0]
    with pytest.raises(ConfigError, match=r"has no token for 'c', 'é', and none for unknown ones; train it with"):
        tokenizer.tokens_of("abécab".encode())


def test_text_that_is_not_utf8_is_refused(loaded):
    with pytest.raises(
        ConfigError, match=r"not UTF-8 \(invalid start byte, byte 2: ff 61\), which a tokenizer.json needs"
    ):
        loaded["llama 3"].tokens_of(b"ab\xffa")


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path):
    path = trained(tmp_path)
    library = Tokenizer.from_file(path)
    library.enable_truncation(3)
    library.enable_padding(length=3)
    library.save(path)
    assert len(load_tokenizer(path).tokens_of(CORPUS.encode())) > 100
    assert len(load_tokenizer(path).tokens_of(b"a")) == 1
