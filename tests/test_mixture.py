"""Several sources: which windows come from which, and runs that train on them, on any mesh and after a resume."""

import gzip
import json
import os

import jax
import numpy as np
import pytest
from helpers import TEXT, mesh_of, small_config
from token_files import VOCAB, documents_of, write_tokenizer, write_tokens

from lss_jax.config.schema import ConfigError, RunError, from_dict
from lss_jax.data.kinds import check_files, is_packed, open_corpus
from lss_jax.data.mixture import BLOCK, allotted, drawn, in_order
from lss_jax.data.sources import fingerprint
from lss_jax.data.token_file import TokenFile
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.inspection.audit import audit_step, problems
from lss_jax.reports.runs import caveats, check_comparable, read_runs
from lss_jax.storage.workdir import saved_config
from lss_jax.tasks import make_task
from lss_jax.training.setup import validate
from lss_jax.training.trainer import Trainer

WEIGHTS = (0.7, 0.2, 0.1)


def run_of(windows, weights, steps, batch_size=8, seed=3):
    return [place for step in range(steps) for place in drawn(step, windows, weights, batch_size=batch_size, seed=seed)]


def test_each_block_has_its_shares_and_each_source_its_own_epochs():
    windows = [500, 90, 1000]
    places = run_of(windows, WEIGHTS, 3 * BLOCK // 8)
    for end in (BLOCK, 2 * BLOCK, 3 * BLOCK):
        counts = np.bincount([source for source, _ in places[:end]])
        assert np.abs(counts - np.multiply(WEIGHTS, end)).max() < len(WEIGHTS)
    for source, count in enumerate(windows):
        mine = [window for s, window in places if s == source]
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))
            expected = np.random.default_rng((3, epoch, source)).permutation(count)
            np.testing.assert_array_equal(mine[epoch * count : (epoch + 1) * count], expected)
    first = [source for source, _ in places[:32]]
    assert set(first) == {0, 1, 2} and first != sorted(first), "mixed"


def test_a_step_is_known_without_those_before():
    windows = [500, 90, 1000]
    places = run_of(windows, WEIGHTS, 400, batch_size=6)
    for step in (399, 0, 170, 171):  # the last two on both sides of a block's border
        assert drawn(step, windows, WEIGHTS, batch_size=6, seed=3) == places[6 * step : 6 * step + 6]
    assert run_of(windows, WEIGHTS, 10, seed=4) != run_of(windows, WEIGHTS, 10)


def test_without_weights_an_epoch_has_every_window_once():
    windows = [700, 24, 300]
    assert sum(windows) == BLOCK
    assert sorted(run_of(windows, (), BLOCK // 8)) == [(s, w) for s, count in enumerate(windows) for w in range(count)]


def test_shares_never_fall():
    shares = [1, 3, 10**6, 2, 10**9]
    found = np.array([allotted(count, shares) for count in range(5000)])
    assert np.all(np.diff(found, axis=0) >= 0)
    np.testing.assert_array_equal(found.sum(1), np.arange(5000))
    assert allotted(sum(shares), shares) == shares


def test_evaluation_takes_all_sources_in_turn():
    places = in_order([10, 2, 1], batch_size=4)
    assert places.shape == (4, 4, 2)
    whole = [tuple(place) for place in places.reshape(-1, 2).tolist()]
    assert sorted(whole[:13]) == [*((0, w) for w in range(10)), (1, 0), (1, 1), (2, 0)]
    assert [w for s, w in whole if s == 0] == list(range(10)), "each source in its order"
    assert {s for s, _ in whole[:8]} == {0, 1, 2}
    assert whole[13:] == [(2, 1), (2, 2), (2, 3)], "then windows behind the end"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer, a token file of it, and plain text, JSONL and gzip to be encoded by it; and a cache for that."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = write_tokenizer(folder)
    token_bytes = load_tokenizer(str(tokenizer)).token_bytes
    write_tokens(folder / "tokens", documents_of([200] * 20, [50] * 20), token_bytes, tokenizer)
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_bytes(TEXT[:3000])
    (folder / "texts" / "b.txt.gz").write_bytes(gzip.compress(TEXT[3000:]))
    lines = [
        json.dumps({"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}, I think."}) for n in range(200)
    ]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def mixed(files, **changes):
    paths = ", ".join(str(files / name) for name in ("tokens", "texts", "chat.jsonl"))
    values = {"source": "text", "path": paths, "tokenizer": str(files / "tokenizer.json"), "weights": (2.0, 1.0, 0.5)}
    values |= {"prompt_field": "question", "answer_field": "answer", "seq_len": 24}
    data = {f"data__{key}": value for key, value in values.items()}
    quick = {"model__layers": 1, "model__vocab": VOCAB, "eval_every": 0, "eval_batches": 2, "log_every": 1}
    return small_config(**data | quick | changes)


def test_all_kinds_of_sources_in_one_run(files):
    """What is encoded on the way has the tokenizer's own tokens; of chats, the answers alone are learned."""
    corpus = open_corpus(mixed(files).data)
    text = load_tokenizer(str(files / "tokenizer.json"))
    _, texts, chats = corpus.streams["train"]
    start = texts.tokens[0 : len(texts.tokens)]
    decoded = b"".join(text.bytes_of(int(token)) for token in start)
    assert TEXT.startswith(decoded[: min(3000, len(decoded))])
    tokens = chats.tokens[0 : len(chats.tokens)]
    learned = [
        int(t) for t, counts in zip(tokens, chats.documents.are_targets(np.arange(len(tokens))), strict=True) if counts
    ]
    answers = b"".join(text.bytes_of(token) for token in learned)
    assert answers.startswith(b"It is 0, I think.") and b"What" not in answers
    (packed, *sources) = make_task(mixed(files)).introduction(make_task(mixed(files)).splits(mesh_of(1, 1))["train"])
    assert packed == "packed   201 documents in the training data"
    assert sources[0] == f"source   57.1% of the windows from {files / 'tokens'}, 3,600 tokens" and len(sources) == 3
    made = sorted(file.suffix for file in (files / "cache").rglob("*") if file.is_file())
    assert made == ["", "", ".turn", ".turn"], "encoded once"


def test_what_was_encoded_before_and_is_damaged_is_named(files):
    (files / "more").mkdir()
    (files / "more" / "a.txt").write_bytes(TEXT[:4000])
    config = mixed(files, data__path=str(files / "more"), data__weights=())
    (stream,) = open_corpus(config.data).streams["train"]
    os.truncate(stream.tokens.source.path, 1000)
    with pytest.raises(
        ConfigError, match=r"it is truncated; .*it is only kept to save time: remove it, and it is made"
    ):
        open_corpus(config.data)


def test_prompts_are_asked_of_jsonl_alone(files):
    (files / "both").mkdir()
    (files / "both" / "a.txt").write_bytes(TEXT[:3000])
    (files / "both" / "chat.jsonl").write_bytes((files / "chat.jsonl").read_bytes())
    config = mixed(files, data__path=str(files / "both"), data__weights=())
    apart = mixed(files, data__path=f"{files}/both/*.jsonl, {files}/both/*.txt", data__weights=(), data__separator="\n")
    with pytest.raises(ConfigError, match=r"both has both JSONL and plain text, .*data.prompt_field='question'; give"):
        open_corpus(config.data)
    chats, text = open_corpus(apart.data).streams["train"]
    assert len(chats.documents) > 150 and len(text.documents) > 10, "a separator, too, is asked of plain text alone"


def losses_of(config, workdir, devices, until=None):
    trainer = Trainer(config, workdir, jax.devices()[:devices])
    found = []
    for record in trainer.fit(lambda step: until is None or step <= until):
        if record["split"] == "train":
            found.append((record["loss"], record["bits_per_byte"]))
    trainer.save()
    trainer.close()
    return found


@pytest.mark.grid
def test_a_mixture_is_the_same_on_any_mesh_and_after_a_resume(files, tmp_path):
    steps = {"optim__steps": 4, "optim__warmup_steps": 1}
    expected = losses_of(mixed(files, mesh__data=1, mesh__seq=2, **steps), tmp_path / "whole", 2)
    first = losses_of(mixed(files, mesh__data=1, mesh__seq=2, **steps), tmp_path / "parts", 2, until=2)
    rest = losses_of(mixed(files, mesh__data=2, mesh__seq=2, **steps), tmp_path / "parts", 4)
    np.testing.assert_allclose([*first, *rest], expected, rtol=1e-5)
    assert saved_config(tmp_path / "parts")["data"]["weights"] == (2.0, 1.0, 0.5), "a tuple again"
    check_units(tmp_path / "whole")


def check_units(workdir):
    """A run on tokens and one on bytes are compared by bits per byte."""
    (one,) = read_runs([workdir])
    assert [metric.unit for metric in one.task.metrics] == ["nats/token", "bits/byte"]
    other = one._replace(name="other", config=small_config(), data=one.data | {"sha256": "0", "bytes": 1})
    check_comparable([one, other])
    assert any("different tokenizers: bits per byte can be compared" in line for line in caveats([one, other]))
    with pytest.raises(ConfigError, match="losses on different data cannot be compared"):
        check_comparable([one, other._replace(data=other.data | {"text_bytes": 1})])


def test_the_fingerprint_covers_every_source(files, tmp_path):
    config = mixed(files, mesh__data=1, optim__steps=2, optim__warmup_steps=1)
    trainer = Trainer(config, tmp_path / "run", jax.devices()[:1])
    trainer.save()
    trainer.close()
    chats = files / "chat.jsonl"
    before = chats.read_bytes()
    chats.write_bytes(before.replace(b"think", b"thing"))
    with pytest.raises(ConfigError, match=r"bytes with fingerprint \w{12}, but the run in .* was trained on"):
        Trainer(config, tmp_path / "run", jax.devices()[:1])
    chats.write_bytes(before)


def test_a_fingerprint_is_that_of_the_tokens_wherever_their_text_was(tmp_path):
    documents, token_bytes = documents_of([50] * 20, [0] * 20, 256), np.ones(256)
    one = write_tokens(tmp_path / "one", documents, token_bytes, None)
    moved = write_tokens(tmp_path / "moved", documents, token_bytes, None, files=json.dumps([["/elsewhere/text", 1]]))
    other = write_tokens(tmp_path / "other", [(documents[0][0], 9), *documents[1:]], token_bytes, None)
    found = [fingerprint(TokenFile(file)) for file in (one, moved, other)]
    assert found[0] == found[1] and found[0]["text_bytes"] == 1000
    assert found[0]["sha256"] != found[2]["sha256"], "what counts as a target is part of it"
    both = fingerprint(TokenFile(one), TokenFile(other))
    assert both["bytes"] == 2 * found[0]["bytes"] and both["sha256"] != found[0]["sha256"]


def test_a_token_file_that_changes_under_a_run_is_seen(files, tmp_path):
    file = tmp_path / "tokens"
    file.write_bytes((files / "tokens").read_bytes())
    split = make_task(mixed(files, data__path=str(file), data__weights=())).splits(mesh_of(1, 1))["train"]
    (source,) = split.sources
    source.check()
    os.utime(file, (0, 0))
    with pytest.raises(RunError, match=r"token file '.*tokens' had \d+ bytes when the run started, and was written to"):
        source.check()


@pytest.mark.parametrize("changes", [{"mesh__seq": 4}, {"mesh__seq": 2, "data__restart_positions": True}])
def test_the_audit_predicts_the_step(files, changes):
    audit = audit_step(
        mixed(files, mesh__data=2, attention__kernel="dense", **changes), jax.devices()[: 2 * changes["mesh__seq"]]
    )
    assert problems(audit, None) == []
    number = 4  # bytes of the step's number, which counts with the batch when it is predicted
    assert audit.memory["batch"] == audit.predicted_memory["batch"] - number


BAD = {
    "weights=(1.0,)": r"data.weights=\(1.0,\) are 1 numbers, but data.path='.*' has 3 sources; give a weight to each",
    "weights=(1.0, 0.0, 1.0)": r"data.weights=\(1.0, 0.0, 1.0\) must each be greater than 0 and finite; leave out",
    "weights=(1.0, float('inf'), 1.0)": "must each be greater than 0 and finite",
    "path='a,,b'": r"data.path='a,,b' has an empty part between commas",
    "answer_field=''": r"data.prompt_field='question' and data.answer_field='' go together; name both",
    "tokenizer=''": r'data.tokenizer="" names no tokenizer; use "bytes", or the path of a tokenizer.json',
}


@pytest.mark.parametrize("change", BAD)
def test_bad_sources_are_refused(files, change):
    key, value = change.split("=", 1)
    with pytest.raises(ConfigError, match=BAD[change]):
        validate(mixed(files, **{"mesh__seq": 8, "mesh__data": 1, f"data__{key}": eval(value)}), 8)


@pytest.mark.parametrize("value", ["x", (1.0, "x"), [True], 0.5, None])
def test_weights_are_numbers(value):
    values = {"data": {"weights": value}}
    with pytest.raises(
        ConfigError, match=r"data.weights=.* is no tuple of numbers; write \(0.7, 0.3\), or \(\) for none"
    ):
        from_dict(values)


def test_files_that_are_not_there_are_all_named(files):
    config = mixed(files, data__path=f"{files}/no.jsonl, {files}/nothing/*.txt", data__tokenizer="no.json")
    with pytest.raises(ConfigError) as caught:
        check_files(config.data)
    assert [line.split(";")[0] for line in str(caught.value).split("\n")] == [
        f"data.path: '{files}/no.jsonl' matches no file",
        f"data.path: '{files}/nothing/*.txt' matches no file",
        "data.tokenizer='no.json' is not a file",
    ]


def test_one_plain_text_is_read_as_it_is(files):
    plain = small_config(data__source="text", data__path=str(files / "texts" / "a.txt"))
    assert not is_packed(plain.data)
    assert open_corpus(plain.data).streams["train"][0].documents is None
    two = small_config(data__source="text", data__path=f"{files / 'texts' / 'a.txt'},{files / 'tokens'}")
    assert is_packed(two.data)
    assert make_task(two).batch_like(mesh_of(1, 1)).target_bytes is None
