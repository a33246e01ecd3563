"""Documents from files: which files, which documents, and which line is wrong."""

import gzip
import json

import pytest

from lss_jax.config.schema import ConfigError
from lss_jax.data import documents
from lss_jax.data.documents import Documents, Fields, files_of

TEXT = Fields("text", "", "")
DIALOGUE = Fields("", "question", "answer")


def texts_of(files, fields=TEXT, separator="") -> list[tuple[bytes, bytes, str]]:
    """Whole documents: prompt, text and place."""
    found, text = [], b""
    for block in Documents(files, fields, separator):
        text += block.text
        if block.ends:
            found.append((block.prompt, text, block.where.rpartition("/")[2]))
            text = b""
    assert text == b"", "every document ends"
    return found


def lines_of(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


# Which files


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.txt",
        "a/c.md",
        "a/deep/d.jsonl.gz",
        "a/deep/e.NDJSON",
        "a/f.py",
        "a/.hidden/g.txt",
        ".h.txt",
        "i.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def names(folder, files):
    return [file.relative_to(folder).as_posix() for file in files]


def test_a_folder_gives_its_documents_at_any_depth_but_nothing_hidden(folder):
    assert names(folder, files_of([str(folder)])) == ["a/c.md", "a/deep/d.jsonl.gz", "a/deep/e.NDJSON", "b.txt"]


def test_globs_and_files_give_what_they_name_sorted_and_each_once(folder):
    assert names(folder, files_of([f"{folder}/**/*.py", f"{folder}/a/*"])) == ["a/c.md", "a/f.py"]
    assert names(folder, files_of([f"{folder}/b.txt", f"{folder}/a/../b.txt", f"{folder}/*.gz"])) == ["b.txt", "i.gz"]
    (folder / "link.txt").symlink_to(folder / "b.txt")
    assert len(files_of([f"{folder}/b.txt", f"{folder}/link.txt"])) == 1


def test_a_file_may_have_the_name_of_a_glob(folder):
    (folder / "a[1].txt").write_text("x")
    assert names(folder, files_of([f"{folder}/a[1].txt"])) == ["a[1].txt"]


def test_every_pattern_that_matches_nothing_is_named(folder):
    with pytest.raises(ConfigError) as refused:
        files_of([f"{folder}/*.txt", "nothing", f"{folder}/a/.hidden/*.md"])
    assert [line.split(" matches")[0] for line in str(refused.value).split("\n")] == [
        "'nothing'",
        f"'{folder}/a/.hidden/*.md'",
    ]
    with pytest.raises(ConfigError, match="there are no files"):
        files_of([])


# Which documents


def test_a_text_is_a_document_whatever_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 7)
    path = tmp_path / "a"
    for length in (1, 6, 7, 8, 30):
        path.write_text("é" * length)
        assert texts_of([path]) == [(b"", path.read_bytes(), "a, line 1")]
        for block in Documents([path], TEXT, ""):
            assert len(block.text) < 20


@pytest.mark.parametrize("block", [4, 5, 6, 7, 1000])
def test_a_separator_ends_documents_and_stays_with_them(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, "BLOCK", block)
    (tmp_path / "a").write_text("one\n##é#two\nlines\n####\n##six")
    whole = texts_of([tmp_path / "a"], separator="\n##")
    assert [(text.decode(), where) for _, text, where in whole] == [
        ("one\n##", "a, line 1"),
        ("é#two\nlines\n##", "a, line 2"),
        ("##\n##", "a, line 4"),
        ("six", "a, line 5"),
    ]
    (tmp_path / "a").write_text("one\n##")
    assert texts_of([tmp_path / "a"], separator="\n##") == [(b"", b"one\n##", "a, line 1")]


def test_lines_are_documents_and_blank_ones_are_not(tmp_path):
    lines_of(tmp_path / "a.jsonl", {"text": "é\n", "id": 1}, {"text": ""})
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n  \n{"text": "last"}')
    assert texts_of([tmp_path / "a.jsonl"]) == [
        (b"", "é\n".encode(), "a.jsonl, line 1"),
        (b"", b"", "a.jsonl, line 2"),
        (b"", b"last", "a.jsonl, line 5"),
    ]


def test_prompts_and_answers(tmp_path):
    path = lines_of(tmp_path / "a.jsonl", {"question": "2 + 2?", "answer": " 4"}, {"question": "", "answer": "x"})
    assert [found[:2] for found in texts_of([path], DIALOGUE)] == [(b"2 + 2?", b" 4"), (b"", b"x")]


def test_gzipped_files_are_read_as_what_is_in_them(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"body": "one"}\n{"body": "two"}\n')
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(b"three")
    files = [tmp_path / "a.jsonl.gz", tmp_path / "b.txt.gz"]
    assert [text for _, text, _ in texts_of(files, Fields("body", "", ""))] == [b"one", b"two", b"three"]


def test_the_position_is_that_in_the_files(tmp_path):
    (tmp_path / "a").write_text("x" * 10)
    (tmp_path / "b").write_text("x" * 5)
    stream = Documents([tmp_path / "a", tmp_path / "b"], TEXT, "")
    assert [stream.position for block in stream if block.ends] == [10, 15]


# What is wrong, and where


WRONG = {
    "empty.txt": (b"", r"empty.txt is empty, without any document"),
    "blank.jsonl": (b"\n\n", r"blank.jsonl is empty, without any document"),
    "a.txt": (b"one\ntwo\nth\xffree", r"a.txt, line 3: is not UTF-8 \(invalid start byte, at bytes ff 72 65 65\)"),
    "half.txt": (b"one\ntwo\xc3", r"half.txt, line 2: is not UTF-8 \(unexpected end of data, at bytes c3\)"),
    "b.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"b.jsonl, line 2: is not UTF-8"),
    "c.jsonl": (b'{"text": "a"}\n\n{"text": "a"', r"c.jsonl, line 3: is not JSON \(Expecting ',' delimiter"),
    "list.jsonl": (b"[1]", r"list.jsonl, line 1: is JSON of type list; each line of a JSONL file is one object"),
    "field.jsonl": (b'{"body": "a", "id": 1}', r"line 1: has no field 'text', but 'body', 'id'; name the field"),
    "number.jsonl": (b'{"text": 5}', r"line 1: field 'text' is int, not a string"),
    "pair.jsonl": (b'{"text": "\\ud800"}', r"line 1: field 'text' has half a surrogate pair"),
    "x.json": (b"{}", r"x.json is by its name neither plain text nor JSONL; name it .jsonl if"),
    "x.txt.gz": (b"text", r"x.txt.gz is no whole gzip file \(Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(b"text" * 99)[:-5], r"cut.txt.gz is no whole gzip file \(Compressed file ended"),
    "crc.txt.gz": (gzip.compress(b"text" * 99)[:-8] + b"12345678", r"is no whole gzip file \(CRC check failed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_file_and_line(tmp_path, name):
    content, told = WRONG[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "sound").write_text("x")
    with pytest.raises(ConfigError, match=told) as refused:
        texts_of([tmp_path / "sound", tmp_path / name])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("block", [3, 4, 5])
def test_lines_are_counted_across_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, "BLOCK", block)
    (tmp_path / "a").write_bytes("é\n".encode() * 9 + b"\n\xe9\n")
    with pytest.raises(ConfigError, match=r"a, line 11: is not UTF-8 \(invalid continuation byte"):
        texts_of([tmp_path / "a"])


def test_prompts_in_plain_text_a_missing_separator_and_a_lost_file_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"a.txt is plain text, which has no field 'question'"):
        texts_of([tmp_path / "a.txt"], DIALOGUE)
    with pytest.raises(ConfigError, match=r"a.txt does not have the separator '\|\|' in it; give a string that ends"):
        texts_of([tmp_path / "a.txt"], separator="||")
    lines_of(tmp_path / "c.jsonl", {"text": "a||b"})
    with pytest.raises(
        ConfigError, match=r"the separator '\|\|' has no use in JSONL files, where a line is a document"
    ):
        texts_of([tmp_path / "c.jsonl"], separator="||")
    with pytest.raises(ConfigError, match=r"b.txt cannot be read \(No such file or directory\)"):
        texts_of([tmp_path / "b.txt"])
