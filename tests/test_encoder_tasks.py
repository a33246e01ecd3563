"""The tasks of encoders from files to metrics: what is masked, what is labelled, equal curves, resuming, and errors."""

import json

import jax
import numpy as np
import oracle
import pytest
from helpers import change, mesh_of, run, small_config

from lss_jax.config.schema import ConfigError
from lss_jax.data.batch import IGNORED
from lss_jax.data.split import EVALUATION
from lss_jax.storage.metrics import read_records
from lss_jax.tasks import make_task
from lss_jax.tasks.labels import label_metrics, label_sums
from lss_jax.tasks.task import means_of
from lss_jax.training.evaluation import evaluate_run
from lss_jax.training.setup import validate

ENCODER = {"model__family": "encoder", "model__layers": 1, "log_every": 1, "eval_every": 0, "eval_batches": 2}
MASK = 256


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(np.random.default_rng(0).choice(list(b"abcdefgh"), 3000).astype(np.uint8).tobytes())
    return path


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of up to 60 letters, labelled by whether there are x among them."""
    random, lines = np.random.default_rng(0), []
    for _ in range(300):
        letters = "".join(random.choice(list("abc"), random.integers(5, 60)))
        has = bool(random.integers(2))
        lines.append({"words": letters[:4] + "x" * 20 + letters[4:] if has else letters, "has": "yes" if has else "no"})
    path = tmp_path_factory.mktemp("documents") / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
        yield path


def masked(text, **changes):
    keys = {"task": "masked_language_model", "model__vocab": MASK + 1, "data__source": "text", "data__path": str(text)}
    return small_config(**ENCODER | keys | changes)


def labelled(documents, **changes):
    keys = {
        **{"task": "sequence_label", "model__classes": 2, "model__pooling": "mean", "labels__names": "no,yes"},
        **{"data__source": "text", "data__path": str(documents), "data__prompt_field": "words"},
        **{"data__answer_field": "has", "optim__learning_rate": 6e-3},
    }
    return small_config(**ENCODER | keys | changes)


def in_natural_order(batch):
    order = np.argsort(batch.positions)
    return {name: np.asarray(getattr(batch, name))[..., order] for name in ("tokens", "targets")}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_is_masked_is_a_hash_of_seed_step_row_and_position(text, layout):
    config = masked(text, attention__layout=layout, masking__rate=0.5, masking__random=0.3, masking__kept=0.3)
    data, L = text.read_bytes(), config.data.seq_len
    for sizes in [(1, 1), (2, 4)]:
        split = make_task(config).splits(mesh_of(*sizes))["valid"]
        found = in_natural_order(split.evaluation_batch(0))
        for row, targets in enumerate(found["targets"]):
            start = len(data) * 90 // 100 + row * L
            window = np.frombuffer(data[start : min(start + L, len(data) * 95 // 100)], np.uint8).astype(int)
            draws = [oracle.hashed(config.seed, EVALUATION, row, draw, np.arange(len(window))) for draw in range(3)]
            hidden, how, _ = (np.asarray(draw, np.float64) / 2**32 for draw in draws)
            behind = np.where(how < 0.3, draws[2] % 256, np.where(how < 0.6, window, MASK))
            tokens = np.where(hidden < 0.5, behind, window)
            np.testing.assert_array_equal(found["tokens"][row, : len(window)], tokens)
            np.testing.assert_array_equal(targets[: len(window)], np.where(hidden < 0.5, window, IGNORED))
            assert np.all(targets[len(window) :] == IGNORED), "behind the end of the data"
    train = make_task(config).splits(mesh_of(1, 1))["train"]
    again, other = (in_natural_order(train.training_batch(step))["targets"] for step in (0, 8))
    assert np.any(again != other)


def curve(config, workdir, devices=None):
    run(config, workdir, devices=devices)
    return np.array(
        [record["loss"] for record in read_records(workdir / "metrics.jsonl") if record["split"] == "train"]
    )


@pytest.mark.grid
@pytest.mark.parametrize("task", ["masked", "labelled"])
def test_curves_are_equal_on_all_meshes_and_resume_bit_for_bit(task, text, documents, tmp_path):
    config = masked(text) if task == "masked" else labelled(documents)
    curves = []
    for sizes in [(1, 1, 1), (1, 3, 1), (2, 2, 2)]:
        on_mesh = change(config, mesh__data=sizes[0], mesh__seq=sizes[1], mesh__model=sizes[2])
        curves.append(curve(on_mesh, tmp_path / f"{sizes}", jax.devices()[: np.prod(sizes)]))
    for other in curves[1:]:
        np.testing.assert_allclose(other, curves[0], rtol=2e-4, atol=2e-5)
    assert np.isfinite(curves[0]).all() and len(curves[0]) == 20
    if task == "labelled":
        assert curves[0][-5:].mean() < 0.7 * curves[0][:3].mean(), "it learns"
    whole = run(on_mesh, tmp_path / "whole")
    run(on_mesh, tmp_path / "parts", stop_after=7)
    resumed = run(on_mesh, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    record = evaluate_run(tmp_path / "whole", "test")
    assert record["split"] == "test" and record["loss"] > 0


def test_labels_are_those_of_the_documents(documents):
    config = labelled(documents, data__seq_len=24)
    split = make_task(config).splits(mesh_of(2, 4))["train"]
    (cut,) = (line for line in make_task(config).introduction(split) if line.startswith("truncated"))
    lines = [json.loads(line) for line in documents.read_text().splitlines()]
    longer = sum(len(line["words"]) > 24 for line in lines[: split.windows[0].training])
    assert cut == f"truncated  {longer} documents of the training data, which are longer than data.seq_len=24"
    batch, first = split.evaluation_batch(0), lines[: config.data.batch_size]
    assert [("no", "yes")[label] for label in np.asarray(batch.labels)] == [line["has"] for line in first]
    order = np.argsort(batch.positions)
    for row, line in enumerate(first):
        words = line["words"].encode()[:24]
        assert bytes(np.asarray(batch.tokens)[row, order][: len(words)].astype(np.uint8)) == words
        start, end = np.asarray(batch.documents)[:, row, order]
        assert np.all(start == 0) and np.all(end[: len(words)] == len(words)) and np.all(end[len(words) :] == 0)


def test_metrics_of_labels():
    """Dice by sets, accuracy by counting; a class that never occurs has none."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(2, 30, 4)).astype(np.float32), random.integers(-1, 3, (2, 30))
    logits[..., 3] = -10
    weights = (1.0, 3.0, 0.0, 1.0)
    metrics = label_metrics(("a", "b", "c", "d"), "pixel")
    sums = jax.tree.map(lambda each: np.asarray(each, np.float64).sum((0, 1)), label_sums(logits, labels, weights))
    found = {metric.name: float(metric.of(means_of(sums))) for metric in metrics}
    counted, chosen = labels >= 0, logits.argmax(-1)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    weight = np.where(counted, np.array(weights)[labels], 0)
    np.testing.assert_allclose(found["loss"], (weight * nats).sum() / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (chosen == labels)[counted].mean(), rtol=1e-6)
    dice = []
    for number in range(3):
        mine, theirs = (chosen == number) & counted, labels == number
        dice.append(2 * (mine & theirs).sum() / (mine.sum() + theirs.sum()))
    np.testing.assert_allclose([found[f"dice_{name}"] for name in "abc"], dice, rtol=1e-6)
    assert np.isnan(found["dice_d"]) and found["dice"] == pytest.approx(np.mean(dice))


def test_weights_of_less_than_one_in_all_are_divided_by_all_the_same():
    weights, labels = (0.1, 1.0), np.zeros((2, 1), np.int32)
    sums = jax.tree.map(lambda each: each.sum((0, 1)), label_sums(np.zeros((2, 1, 2), np.float32), labels, weights))
    assert float(means_of(sums)["loss"]) == pytest.approx(np.log(2))


WRONG = {
    "a decoder": (
        {"model__family": "decoder"},
        r"task='sequence_label' predicts a class for each sequence, which model.family='decoder' does not do; "
        r'use model.family="encoder"',
    ),
    "classes": ({"model__classes": 3}, r"model.classes=3, but there are 2 classes \(no, yes\); use model.classes=2"),
    "no pooling": ({"model__pooling": "none"}, r"model.pooling='none' does not suit task='sequence_label'; use"),
    "names": ({"labels__names": "yes,yes"}, r"labels.names='yes,yes' must be different names with commas between"),
    "weights": ({"labels__weights": (1.0,)}, r"labels.weights=\(1.0,\) are 1 numbers for 2 classes; give one to each"),
    "negative weights": ({"labels__weights": (1.0, -1.0)}, r"labels.weights=\(1.0, -1.0\) must be at least 0 and fin"),
    "no labels": (
        {"data__prompt_field": "", "data__answer_field": ""},
        r"task='sequence_label' needs documents with labels; give JSONL with the document in data.prompt_field",
    ),
    "a prefix": ({"attention__prefix": 3}, r"attention.prefix=3 has no use with task='sequence_label', where all"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_suit_labels_is_refused(wrong, documents):
    changes, message = WRONG[wrong]
    with pytest.raises(ConfigError, match=message):
        validate(labelled(documents, **changes), 1)


def test_what_does_not_suit_masked_tokens_is_refused(text):
    for changes, message in [
        (
            {"model__vocab": 256},
            r"model.vocab=256 is less than 257, which data of bytes with a mask token needs",
        ),
        ({"model__classes": 2}, r"model.classes=2, model.pooling='none' are for tasks with labels, and task='masked_"),
        ({"masking__rate": 0.0}, r"masking.rate=0.0 must be between 0 and 1, and masking.random=0.1 and masking.kept="),
    ]:
        with pytest.raises(ConfigError, match=message):
            validate(masked(text, **{"model__vocab": 257, **changes}), 1)


def test_a_source_without_labels_is_refused(text):
    config = masked(text, task="token_labels", model__classes=2)
    with pytest.raises(
        ConfigError, match=r"data.source='text' has no labels of tokens, which task='token_labels' needs"
    ):
        validate(config, 1)


def test_documents_without_labels_are_refused(documents, tmp_path):
    (tmp_path / "plain.txt").write_text("a text without any labels. " * 20)
    with pytest.raises(ConfigError, match=r"has a part without prompts, which task='sequence_label' needs; give JSONL"):
        make_task(labelled(documents, data__path=str(tmp_path / "plain.txt"))).splits(mesh_of(1, 1))
    with pytest.raises(
        ConfigError, match=r"data.source='copy' has pairs of symbols, which task='masked_language_model'"
    ):
        validate(masked("", data__source="copy"), 1)


def test_a_label_outside_the_classes_is_refused(documents):
    with pytest.raises(
        ConfigError, match=r"document 1 of the split 'train' has the label '(no|yes)', which is none of"
    ):
        make_task(labelled(documents, labels__names="ja,nein")).splits(mesh_of(1, 1))
