"""The token file: what is written is read, by this program and by safetensors, and what is damaged is refused."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lss_jax.config.schema import ConfigError, RunError
from lss_jax.data import token_file
from lss_jax.data.token_file import FORMAT, About, Column, TokenFile, dtype_of, is_token_file, write_token_file

TOKENS = np.arange(1000, 1017)
ENDS, FIRSTS = np.array([5, 6, 17]), np.array([1, 6, 9])
ABOUT = About("a sum", "</s>", 40, [("a.txt", 30), ("b, c.txt", 10)])


def column(array, dtype, pieces=1) -> Column:
    return Column(np.dtype(dtype), len(array), np.array_split(np.asarray(array, dtype), pieces))


def written(path, vocab=2000, **changed) -> TokenFile:
    columns = {
        "tokens": column(TOKENS, dtype_of(vocab), pieces=3),
        "document_ends": column(ENDS, "<i8"),
        "first_targets": column(FIRSTS, "<i8"),
        "token_bytes": column(np.arange(vocab) % 7, "<u2"),
    }
    write_token_file(path, ABOUT, columns | changed)
    return TokenFile(path)


def test_what_is_written_is_read(tmp_path):
    file = written(tmp_path / "file")
    assert (file.size, file.vocab, file.dtype, file.path) == (17, 2000, np.uint16, tmp_path / "file")
    assert (file.tokenizer, file.end, file.text_bytes, file.files) == ABOUT
    for start, stop in ((0, 17), (3, 9), (16, 17), (5, 5)):
        np.testing.assert_array_equal(file.read(start, stop), TOKENS[start:stop])
    np.testing.assert_array_equal(file.document_ends, ENDS)
    np.testing.assert_array_equal(file.first_targets, FIRSTS)
    assert file.token_bytes.dtype == np.uint16 and file.token_bytes.sum() == (np.arange(2000) % 7).sum()
    assert file.mapped().tobytes() == (tmp_path / "file").read_bytes()
    assert os.listdir(tmp_path) == ["file"]


def test_safetensors_reads_it_and_what_it_writes_is_read(tmp_path):
    written(tmp_path / "file")
    arrays = load_file(tmp_path / "file")
    np.testing.assert_array_equal(arrays["tokens"], TOKENS)
    metadata = {"format": FORMAT, **{k: str(v) for k, v in ABOUT._asdict().items()}, "files": json.dumps(ABOUT.files)}
    save_file(arrays, tmp_path / "other", metadata)
    np.testing.assert_array_equal(TokenFile(tmp_path / "other").read(0, 17), TOKENS)


@pytest.mark.parametrize(("vocab", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_tokens_are_as_small_as_the_vocabulary_allows(tmp_path, vocab, dtype):
    largest = np.array([vocab - 1] * 17)
    file = written(tmp_path / "file", vocab, tokens=column(largest, dtype_of(vocab)))
    assert file.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(file.read(0, 17), largest)


def test_a_file_that_is_none_is_none(tmp_path):
    path = tmp_path / "file"
    assert not is_token_file(path)
    for content in (b"", b"text", b"{}" * 9, json.dumps({"format": "lss_jax tokens"}).encode()):
        path.write_bytes(content)
        assert not is_token_file(path)
        with pytest.raises(ConfigError, match="file is no token file"):
            TokenFile(path)
    save_file({"a": np.zeros(3)}, path)
    assert not is_token_file(path)
    with pytest.raises(ConfigError, match="its format is None, not 'lss_jax tokens 1'; encode it again with python -m"):
        TokenFile(path)
    with pytest.raises(ConfigError, match=r"gone cannot be read \(No such file or directory\); give a token file"):
        TokenFile(tmp_path / "gone")


@pytest.mark.parametrize("left", [4, 100, 200, -1])
def test_a_truncated_file_is_refused_with_both_sizes(tmp_path, left):
    written(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:left])
    size = len(content[:left])
    assert is_token_file(tmp_path / "file") == (left != 4)
    told = rf"{size} bytes, but .* {len(content)}: it is truncated" if left == -1 else rf"{size} bytes"
    with pytest.raises(ConfigError, match=told):
        TokenFile(tmp_path / "file")


def test_bytes_behind_the_arrays_are_refused(tmp_path):
    written(tmp_path / "file")
    with (tmp_path / "file").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ConfigError, match=r"has \d+ bytes behind its header, but its arrays have \d+"):
        TokenFile(tmp_path / "file")


CONTRADICTIONS = {
    "document_ends has 2 documents, first_targets 3": {"document_ends": column([5, 17], "<i8")},
    "do not increase from 1 or more to the 17 tokens": {"document_ends": column([5, 4, 17], "<i8")},
    "increase from 1 or more to the 17": {"document_ends": column([5, 6, 18], "<i8")},
    "first_targets are not behind the first token of their": {"first_targets": column([1, 5, 9], "<i8")},
    "or beyond the last": {"first_targets": column([1, 7, 9], "<i8")},
    "there is a token 1016, of a vocabulary of 1010": {"token_bytes": column(np.ones(1010), "<u2")},
    "tokens are uint32, but a vocabulary of 2000 has uint16": {"tokens": column(TOKENS, "<u4")},
    "tokens is .*'I64'.*, not one of": {"tokens": column(TOKENS, "<i8")},
}


@pytest.mark.parametrize("told", CONTRADICTIONS)
def test_parts_that_contradict_one_another_are_refused(tmp_path, told):
    with pytest.raises(ConfigError, match=told):
        written(tmp_path / "file", **CONTRADICTIONS[told])


def test_tokens_beyond_the_vocabulary_are_found_when_a_long_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "LOOKED_AT", 5)
    file = written(tmp_path / "file", 1010, token_bytes=column(np.ones(1010), "<u2"))
    assert file.read(0, 10).tolist() == TOKENS[:10].tolist()
    with pytest.raises(RunError, match="has token 1010 in 9 to 11, of a vocabulary of 1010"):
        file.read(9, 11)


def test_a_file_that_changes_ends_the_run(tmp_path):
    file = written(tmp_path / "file")
    file.check()
    os.utime(tmp_path / "file", (1, 1))
    with pytest.raises(RunError, match=r"was written to; put the file back"):
        file.check()
    os.truncate(tmp_path / "file", file.mapped().size - 2 * (2000 + 5))
    with pytest.raises(RunError, match="bytes now"):
        file.check()
    with pytest.raises(RunError, match=r"had .* bytes when the run started, and ends before byte"):
        file.read(12, 17)


def test_nothing_half_written_stays(tmp_path):
    def broken():
        yield TOKENS[:3].astype(np.uint16)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", tokens=Column(np.dtype("<u2"), 17, broken()))
    assert os.listdir(tmp_path) == []
