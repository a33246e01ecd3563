"""Encoding into a token file: the tokens of each document, in parallel, resumed after a kill, and the command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizer_cases import CORPUS, like_llama2, like_llama3, trained, without_an_alphabet
from tokenizers import Tokenizer

from lss_jax import tokenize
from lss_jax.config.schema import ConfigError, RunError
from lss_jax.data import encoding, parts, pieces
from lss_jax.data.documents import Fields
from lss_jax.data.text import ByteText
from lss_jax.data.token_file import TokenFile
from lss_jax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
TEXT = Fields("text", "", "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(trained(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def small(monkeypatch):
    """Many parts, and pieces, of little text."""
    monkeypatch.setattr(pieces, "PIECE", 100)
    monkeypatch.setattr(pieces, "CONTEXT", 30)
    monkeypatch.setattr(encoding, "BATCH", 300)


@pytest.fixture
def corpus(tmp_path):
    """Documents of many lengths: a long text, and lines of JSONL."""
    (tmp_path / "a.txt").write_text(CORPUS * 3)
    texts = [CORPUS[i : i + (i * 37) % 400] for i in range(1, 200)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [tmp_path / "a.txt", tmp_path / "b.jsonl"], [CORPUS * 3, *texts]


def encoded(files, out, tokenizer, fields=TEXT, separator="", part_bytes=1000) -> TokenFile:
    return encoding.encode(
        files, out, tokenizer, fields=fields, separator=separator, progress=False, part_bytes=part_bytes
    )


def documents_of(file: TokenFile) -> list[list[int]]:
    starts = [0, *file.document_ends[:-1]]
    return [file.read(int(start), int(end)).tolist() for start, end in zip(starts, file.document_ends, strict=True)]


def test_each_document_has_the_tokens_of_the_library_and_an_end(tmp_path, small, corpus, tokenizer):
    files, texts = corpus
    file = encoded(files, tmp_path / "out", tokenizer)
    library = Tokenizer.from_file(tokenizer.name)
    assert documents_of(file) == [[*library.encode(text).ids, 0] for text in texts if text]
    np.testing.assert_array_equal(file.first_targets[1:], file.document_ends[:-1] + 1)
    assert file.first_targets[0] == 1 and file.dtype == np.uint16
    assert (file.tokenizer, file.end) == (tokenizer.fingerprint, "<|endoftext|>")
    assert file.text_bytes == sum(len(text.encode()) for text in texts)
    assert file.token_bytes[file.read(0, file.size)].sum() == file.text_bytes
    assert file.files == [(str(path), path.stat().st_size) for path in files]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl", "out"]


@pytest.mark.parametrize("make", [like_llama2, like_llama3])
def test_what_a_tokenizer_puts_first_begins_each_document_once(tmp_path, small, corpus, make):
    files, texts = corpus
    (tmp_path / "t").mkdir()
    path = make(tmp_path / "t")
    library = Tokenizer.from_file(path)
    file = encoded(files, tmp_path / "out", load_tokenizer(path))
    assert documents_of(file) == [[*library.encode(text).ids, library.token_to_id(file.end)] for text in texts if text]


def test_bytes_are_encoded_as_they_are(tmp_path, small, corpus):
    files, texts = corpus
    file = encoded(files, tmp_path / "out", ByteText())
    assert file.read(0, file.size).tobytes() == "".join(texts).encode()
    assert (file.tokenizer, file.end, file.dtype, file.vocab) == ("bytes", "", np.uint8, 256)
    np.testing.assert_array_equal(np.diff(file.document_ends, prepend=0), [len(t.encode()) for t in texts if t])


def test_an_end_that_is_written_in_the_text_is_not_repeated(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>")
    file = encoded([tmp_path / "a.txt"], tmp_path / "out", tokenizer, separator="<|endoftext|>")
    assert [document.count(0) for document in documents_of(file)] == [1, 1]


@pytest.mark.parametrize("make", [trained, like_llama2, like_llama3])
def test_only_answers_are_targets(tmp_path, make):
    lines = [("The cat", " sat"), ("", "there"), ("on the mat\n", "mat " * 300)]
    items = [{"q": prompt, "a": answer, "n": 1} for prompt, answer in lines]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tokenizer = load_tokenizer(make(tmp_path))
    file = encoded([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, Fields("", "q", "a"), part_bytes=30)
    starts = np.array([0, *file.document_ends[:-1]])
    for (prompt, answer), document, first in zip(lines, documents_of(file), file.first_targets - starts, strict=True):
        of_prompt, of_answer = tokenizer.tokens_of(prompt.encode()).tolist(), document[first:]
        assert document[: len(of_prompt)] == of_prompt and first == max(len(of_prompt), 1)
        assert of_answer[-1] == tokenizer.end
        text = b"".join(map(tokenizer.bytes_of, document[len(of_prompt) :])).decode()
        assert text.lstrip() == answer.lstrip() and (text == answer or not prompt), "joined without a space"


def test_documents_without_text_are_left_out_and_reported(tmp_path, tokenizer, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "cat"}\n{"text": ""}\n')
    assert len(encoded([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer).document_ends) == 1
    assert "2 documents are empty, and are left out" in caplog.text
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ConfigError, match="all 1 documents are empty"):
        encoded([tmp_path / "a.jsonl"], tmp_path / "out2", tokenizer)
    assert not (tmp_path / "out2.parts").exists()


# Parts


def watch_saves(monkeypatch, stop_at=None, error=KeyboardInterrupt):
    """The numbers of the parts that are saved; the one `stop_at` ends the encoding."""
    saves, save = [], parts.save_part

    def watched(path, part):
        if stop_at is not None and len(saves) == stop_at:
            raise error
        saves.append(path.name)
        save(path, part)

    monkeypatch.setattr(parts, "save_part", watched)
    return saves


@pytest.fixture
def expected(tmp_path, small, corpus, tokenizer):
    file = encoded(corpus[0], tmp_path / "expected", tokenizer)
    return file.path.read_bytes()


def test_parts_of_any_size_and_any_number_of_threads_give_the_same_tokens(tmp_path, corpus, tokenizer, expected):
    for part_bytes in (300, 5000, 10**6):
        encoded(corpus[0], tmp_path / "out", tokenizer, part_bytes=part_bytes)
        assert (tmp_path / "out").read_bytes() == expected
    code = (
        f"from lss_jax.data.encoding import *; from lss_jax.data.tokenizer import load_tokenizer; "
        f"encode([Path(p) for p in {[str(p) for p in corpus[0]]}], Path({str(tmp_path / 'serial')!r}), "
        f"load_tokenizer({tokenizer.name!r}), fields=Fields('text', '', ''), separator='', progress=False)"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "serial").read_bytes() == expected


def test_an_interrupted_encoding_goes_on_and_gives_the_same_file(tmp_path, corpus, tokenizer, expected, monkeypatch):
    with monkeypatch.context() as patch:
        done = watch_saves(patch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            encoded(corpus[0], tmp_path / "out", tokenizer)
    assert len(done) == 4 and not (tmp_path / "out").exists()
    (tmp_path / "out.parts" / done[0]).write_bytes(b"damaged")
    again = watch_saves(monkeypatch)
    encoded(corpus[0], tmp_path / "out", tokenizer)
    assert set(done) & set(again) == {done[0]} and len(set(done) | set(again)) == len(again) + 3
    assert (tmp_path / "out").read_bytes() == expected and not (tmp_path / "out.parts").exists()


def test_a_killed_process_leaves_parts_with_which_the_next_goes_on(tmp_path, corpus, tokenizer, expected, monkeypatch):
    code = f"""
import os, signal
from pathlib import Path
from lss_jax.data import encoding, parts, pieces
from lss_jax.data.documents import Fields
from lss_jax.data.tokenizer import load_tokenizer
pieces.PIECE, pieces.CONTEXT, encoding.BATCH = 100, 30, 300
save, count = parts.save_part, []
def watched(path, part):
    count.append(path)
    if len(count) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, part)
parts.save_part = watched
encoding.encode([Path(p) for p in {[str(p) for p in corpus[0]]}], Path({str(tmp_path / "out")!r}),
    load_tokenizer({tokenizer.name!r}), fields=Fields("text", "", ""), separator="", progress=False, part_bytes=1000)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "out.parts").glob("*.npz")}
    again = watch_saves(monkeypatch)
    encoded(corpus[0], tmp_path / "out", tokenizer)
    assert len(left) >= 4 and left.isdisjoint(again)
    assert (tmp_path / "out").read_bytes() == expected


CHANGES = {
    "a file": lambda files, _: files[0].write_text(CORPUS),
    "its time": lambda files, _: os.utime(files[1], (1, 1)),
    "a part's size": lambda _, options: options.update(part_bytes=1001),
    "the separator": lambda _, options: options.update(separator="\n\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_other_text_are_not_used(tmp_path, small, corpus, tokenizer, monkeypatch, change):
    with monkeypatch.context() as patch:
        watch_saves(patch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            encoded(corpus[0], tmp_path / "out", tokenizer)
    options = {"part_bytes": 1000, "separator": ""}
    CHANGES[change](corpus[0], options)
    again = watch_saves(monkeypatch)
    encoded(corpus[0], tmp_path / "out", tokenizer, **options)
    assert "000000.npz" in again


def test_two_cannot_write_the_same_file(tmp_path, corpus, tokenizer):
    with (
        parts.locked_folder(tmp_path / "out"),
        pytest.raises(RunError, match=r"another process is writing .*out; wait"),
    ):
        encoded(corpus[0], tmp_path / "out", tokenizer)
    encoded(corpus[0], tmp_path / "out", tokenizer)


def test_a_full_disk_ends_it_and_the_finished_parts_stay(tmp_path, small, corpus, tokenizer, monkeypatch):
    done = watch_saves(monkeypatch, 3, OSError(28, "No space left on device"))
    with pytest.raises(RunError, match=r"out cannot be written \(No space left on device\); make room, then the same"):
        encoded(corpus[0], tmp_path / "out", tokenizer)
    assert {path.name for path in (tmp_path / "out.parts").glob("*.npz")} == set(done) and len(done) == 3


def test_files_that_change_meanwhile_are_noticed(tmp_path, small, corpus, tokenizer, monkeypatch):
    join = encoding._make_parts

    def changing(*arguments):
        os.utime(corpus[0][0], (1, 1))
        return join(*arguments)

    monkeypatch.setattr(encoding, "_make_parts", changing)
    with pytest.raises(RunError, match=r"files have changed while .*out was made of them"):
        encoded(corpus[0], tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_bad_documents_leave_nothing(tmp_path, small, corpus, tokenizer):
    (tmp_path / "c.jsonl").write_text('{"text": 1}')
    with pytest.raises(ConfigError, match="line 1: field 'text' is int"):
        encoded([*corpus[0], tmp_path / "c.jsonl"], tmp_path / "out", tokenizer)
    assert not list(tmp_path.glob("out*"))


def test_a_character_without_a_token_is_named_with_its_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abba"}\n{"text": "abc"}\n')
    tokenizer = load_tokenizer(without_an_alphabet(tmp_path))
    with pytest.raises(ConfigError, match=r"a.jsonl, line 2: data.tokenizer=.* has no token for 'c', and none for"):
        encoded([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)


# The command


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["tokenize", *map(str, arguments)])
    return tokenize.main()


def test_the_command_trains_and_encodes(tmp_path, corpus, monkeypatch, capsys):
    vocabulary = tmp_path / "t" / "tokenizer.json"
    vocabulary.parent.mkdir()
    assert call(monkeypatch, "--train", 300, "--out", vocabulary, *corpus[0]) == 0
    assert capsys.readouterr().out.startswith(f"tokenizer  {vocabulary}, 300 tokens, from ")
    out = tmp_path / "out"
    assert call(monkeypatch, "--tokenizer", vocabulary, "--out", out, tmp_path / "*.txt", corpus[0][1]) == 0
    file, shown = TokenFile(out), capsys.readouterr().out.splitlines()
    documents = len([text for text in corpus[1] if text])
    assert shown[0] == f"documents  {documents}, from 2 files, each ending with <|endoftext|>"
    assert shown[1] == (f"tokens     {file.size:,}, of {file.text_bytes / file.size:.2f} bytes; vocabulary 300, uint16")
    assert shown[3] == f"file       {out}, {out.stat().st_size:,} bytes"
    assert file.tokenizer == load_tokenizer(str(vocabulary)).fingerprint


def test_an_interruption_says_what_stays(tmp_path, small, corpus, tokenizer, monkeypatch, capsys):
    watch_saves(monkeypatch, stop_at=0)
    assert call(monkeypatch, "--tokenizer", tokenizer.name, "--out", tmp_path / "out", *corpus[0]) == 130
    assert capsys.readouterr().err == (
        f"interrupted; finished parts are in {tmp_path / 'out'}.parts, and the same command goes on\n"
    )


REFUSED = {
    "--tokenizer bytes --prompt-field q": "--prompt-field=q and --answer-field=None go together",
    "--tokenizer bytes --field a --prompt-field q --answer-field a": "--field=a is of a text",
    "--tokenizer bytes --end x": "--end='x': bytes have no special tokens",
    "--train 300 --end x": "--end=x is for encoding",
    "--tokenizer bytes --workers 0": "--workers=0 must be at least 1",
    "--tokenizer bases": "--tokenizer=bases: genomes are trained on as they are; give their files to data.source",
    "--tokenizer none.json": "data.tokenizer='none.json' cannot be read",
    "--tokenizer bytes nothing/*": "'nothing/*' matches no file",
    "--tokenizer bytes --out {folder}": "is a folder; choose another",
    "--tokenizer bytes --out {folder}/a.txt": "is one of the files; choose another",
    "--tokenizer bytes --out {folder}/no/out": "no/out.parts cannot be written (No such file or directory); choose",
    "--train 300 --out {folder}/no/out": "no/out cannot be written (No such file or directory); choose another --out",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_is_refused_and_writes_nothing(tmp_path, corpus, monkeypatch, options):
    before = sorted(tmp_path.iterdir())
    given = options.format(folder=tmp_path).split()
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    with pytest.raises(ConfigError) as refused:
        call(monkeypatch, *given, *out, corpus[0][0])
    assert REFUSED[options] in str(refused.value) and "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\xff")
    line = ["-m", "lss_jax.tokenize", "--tokenizer", "bytes", "--out", tmp_path / "out", tmp_path / "a.txt"]
    failed = subprocess.run([sys.executable, *map(str, line)], cwd=ROOT, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == (
        f"error: {tmp_path}/a.txt, line 2: is not UTF-8 (invalid start byte, at bytes ff); convert the file to UTF-8\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_name_of_the_module_hides_nothing():
    """The standard library's `tokenize` is what Python's own modules find, also when ours is run."""
    code = "import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module('lss_jax.tokenize', run_name='__main__')"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--prompt-field" in shown.stdout, shown.stderr
    import tokenize as standard

    assert hasattr(standard, "generate_tokens")
