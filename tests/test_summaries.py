"""Papers and summaries as data, files that are held out, ROUGE, and the first sentences as a baseline."""

import json
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import change, mesh_of, run, small_config

from lss_jax.config.schema import ConfigError, RunError
from lss_jax.data.windows import sides
from lss_jax.generation.beams import Beams
from lss_jax.generation.generate import generate_text
from lss_jax.reports.rouge import MEASURES, Rouge, first_sentences
from lss_jax.reports.summaries import Saved, evaluate_rouge
from lss_jax.tasks import make_task
from lss_jax.training.setup import validate

PAIRS = {
    **{"task": "sequence_to_sequence", "model__family": "encoder_decoder", "model__vocab": 257},
    **{"data__source_len": 64, "data__seq_len": 32, "data__batch_size": 4},
}
PAPERS = {**PAIRS, "data__source": "aclsum", "data__prompt_field": "abstract", "data__answer_field": "outcome"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pairs_of(split) -> list[tuple[str, str]]:
    """The sources and targets of a split, whole."""
    (windows,) = split.windows
    found = []
    for number in range(windows.evaluation):
        texts = (bytes(stream.tokens[start:stop]).decode() for stream, start, stop in sides(windows[number]))
        found.append(tuple(texts))
    return found


def test_papers_keep_their_splits_sentences_and_summaries():
    aclsum = pytest.importorskip("aclsum", reason="an optional package")
    splits = make_task(small_config(**PAPERS)).splits(mesh_of(1, 2))
    for name, of_package, count in (("train", "train", 100), ("valid", "val", 50), ("test", "test", 100)):
        expected = [("\n".join(p.sentences["abstract"]), p.summaries["outcome"]) for p in aclsum.ACLSum(of_package)]
        assert pairs_of(splits[name]) == expected and len(expected) == count


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "aclsum", None)
    with pytest.raises(ConfigError, match=r"needs the package aclsum .*; pip install aclsum==0.1.2, or use"):
        make_task(small_config(**PAPERS)).splits(mesh_of(1, 1))


@pytest.fixture
def files(tmp_path):
    for name, count in (("train", 9), ("valid", 3), ("test", 2)):
        rows = [{"source": f"{name} source {n}", "target": f"{name} {n}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"data__prompt_field": "source", "data__answer_field": "target"}
    paths = {"data__path": "train", "data__valid_path": "valid", "data__test_path": "test"}
    return {"data__source": "text", **fields, **{key: str(tmp_path / f"{n}.jsonl") for key, n in paths.items()}}


def test_files_that_are_held_out_are_whole_splits(files):
    splits = make_task(small_config(**PAIRS, **files)).splits(mesh_of(1, 2))
    for name, count in (("train", 9), ("valid", 3), ("test", 2)):
        assert pairs_of(splits[name]) == [(f"{name} source {n}", f"{name} {n}") for n in range(count)]


def test_plain_texts_can_be_held_out_too(files, tmp_path):
    (tmp_path / "held_out.txt").write_bytes(b"z" * 100)
    (tmp_path / "text.txt").write_bytes(b"a" * 500)
    paths = {"data__valid_path": str(tmp_path / "held_out.txt"), "data__test_path": files["data__test_path"]}
    fields = {"data__field": "target", "data__path": str(tmp_path / "text.txt")}
    splits = make_task(small_config(data__source="text", **fields, **paths)).splits(mesh_of(1, 1))
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [500, 100, 12]
    assert set(np.unique(splits["valid"].evaluation_batch(0).tokens)) == {0, ord("z")}


REFUSED = {
    "one without the other": ({"data__test_path": ""}, "go together; name both, or none, and parts of data.path are"),
    "nothing between commas": ({"data__valid_path": "a,,b"}, "data.valid_path='a,,b' has an empty part between commas"),
    "not a text": ({"data__source": "copy", "data__path": ""}, "have no use with data.source='copy'; use \"\", or"),
    "no field": (
        {**PAPERS, "data__answer_field": "result", "data__path": ""},
        "data.answer_field='result' is not known",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_out_is_refused(case, files):
    changes, told = REFUSED[case]
    held_out = {} if "answer" in told else files
    with pytest.raises(ConfigError) as refused:
        validate(small_config(**{**PAIRS, **held_out, **changes}), 1)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_missing_is_named(files):
    with pytest.raises(ConfigError, match=r"none.jsonl' matches no file"):
        make_task(small_config(**PAIRS, **{**files, "data__test_path": "none.jsonl"})).splits(mesh_of(1, 1))


def test_a_target_of_bytes_ends_with_the_start_token_unless_it_is_cut(files):
    config = small_config(**{**PAIRS, "data__seq_len": 8, "attention__layout": "contiguous"}, **files)
    batch = make_task(config).splits(mesh_of(2, 2))["valid"].evaluation_batch(0)
    np.testing.assert_array_equal(batch.targets[0], [*b"valid 0", 256])
    np.testing.assert_array_equal(batch.tokens[0], [256, *b"valid 0"])
    np.testing.assert_array_equal(batch.lengths, [[14, 14, 14, 0], [8, 8, 8, 0]])
    shorter = make_task(small_config(**{**PAIRS, "data__seq_len": 5}, **files)).splits(mesh_of(1, 1))
    np.testing.assert_array_equal(shorter["valid"].evaluation_batch(0).lengths[1], [5, 5, 5, 0])


# ROUGE


def by_hand(reference, text) -> dict[str, float]:
    """F-measures in percent, of words that no stemmer changes: shared ones, shared pairs, and the longest in order."""
    a, b = reference.split(), text.split()

    def f(shared, one, other):
        return 200 * shared / (one + other)

    def shared(n):
        ones, others = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (a, b))
        return f((ones & others).total(), ones.total(), others.total())

    longest = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in np.ndindex(len(a), len(b)):
        longest[i + 1, j + 1] = longest[i, j] + 1 if a[i] == b[j] else max(longest[i, j + 1], longest[i + 1, j])
    return dict(zip(MEASURES, (shared(1), shared(2), f(longest[-1, -1], len(a), len(b))), strict=True))


def test_rouge_is_what_it_is_by_hand_and_the_mean_over_documents():
    pytest.importorskip("rouge_score", reason="an optional package")
    pairs = [("the cat sat on the mat", "on the mat the cat lay"), ("a red fox ran", "a fox ran off as a red fox ran")]
    expected = [by_hand(*pair) for pair in pairs]
    for pair, scores in zip(pairs, expected, strict=True):
        assert Rouge().of(*([one] for one in pair)) == pytest.approx(scores)
    means = {name: (expected[0][name] + expected[1][name]) / 2 for name in MEASURES}
    assert Rouge().of(*map(list, zip(*pairs, strict=True))) == pytest.approx(means)
    assert Rouge().of(["Summaries of parsing"], ["summary parsed, of"])["rouge1"] == 100, "words are stemmed"


def test_without_its_package_rouge_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"needs the package rouge-score .*; pip install rouge-score==0.1.2"):
        Rouge()


SENTENCES = {
    "one line\nanother. Line\n": ["one line", "another. Line"],
    "We parse. It works, i.e. well! (So we say.) Does it? yes": ["We parse.", "It works, i.e. well!", "(So we say.)"],
    "  none that ends": ["none that ends"],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_the_first_sentences_are_lines_or_end_with_a_stop(text):
    sentences = SENTENCES[text]
    for count in range(1, len(sentences) + 1):
        assert first_sentences(text, count) == " ".join(sentences[:count])


def test_texts_are_taken_up_again_if_they_are_of_the_same_search(tmp_path):
    of = {"step": 5, "beams": 2, "data": {"weights": ()}}
    first = Saved(tmp_path / "texts.json", of)
    first.add([b" a\xff ", b"b"])
    assert Saved(tmp_path / "texts.json", of).texts == ["a\ufffd", "b"]
    assert Saved(tmp_path / "texts.json", of | {"step": 6}).texts == []
    with pytest.raises(RunError, match=r"texts.json cannot be written \(.*\); make room, then the same command"):
        Saved(tmp_path / "none" / "texts.json", of).add([b"a"])


def test_rouge_of_a_model_that_answers_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError) as refused:
        evaluate_rouge(small_config(), tmp_path, "test", None, Beams(0, 0.6))
    beams, family = str(refused.value).split("\n")
    assert "--beams=0 leaves no text" in beams and "model.family='decoder' reads none; give a run of" in family


@pytest.mark.grid
def test_a_run_is_evaluated_and_an_evaluation_goes_on(files, tmp_path):
    """The first batch alone, then both, without generating the first one again; on another mesh, the same texts."""
    config = small_config(**PAIRS, **files, mesh__data=1, mesh__seq=2, optim__steps=2, model__positions="rope")
    run(config, tmp_path / "run", devices=jax.devices()[:2])
    meshes = [change(config, mesh__data=data, mesh__seq=seq) for data, seq in ((2, 4), (1, 8))]
    sample = evaluate_rouge(meshes[0], tmp_path / "run", "train", 1, Beams(2, 0.6))
    assert sample["documents"] == 4 and set(sample["scores"]) == {"model", "first sentence", "first 3 sentences"}
    saved = tmp_path / "run" / "summaries_train.json"
    content = json.loads(saved.read_text())
    content["texts"][0] = "was there before"
    saved.write_text(json.dumps(content))
    whole = evaluate_rouge(meshes[1], tmp_path / "run", "train", None, Beams(2, 0.6))
    texts = [pair["text"] for pair in whole["texts"]]
    assert whole["documents"] == 9 and texts[0] == "was there before" and len(texts) == 9
    assert texts[1:4] == [pair["text"] for pair in sample["texts"][1:]]
    answer = generate_text(tmp_path / "run", "train source 2", 32, beams=2, config=meshes[1])
    assert answer.strip() == texts[2], "alone as among others"
    assert [pair["reference"] for pair in whole["texts"]] == [f"train {number}" for number in range(9)]
