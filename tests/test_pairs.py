"""Pairs of a source and a target: what is read of them, sources that are generated, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Watched, assert_close, mesh_of, run, small_config
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import ConfigError
from lss_jax.data.batch import IGNORED
from lss_jax.data.generated import Repeated
from lss_jax.data.packing import Packing, Stream
from lss_jax.data.sources import fingerprint
from lss_jax.data.windows import PairWindows
from lss_jax.models.losses import cross_entropy, vocab_parallel_cross_entropy
from lss_jax.parallel.mesh import MODEL
from lss_jax.storage.metrics import read_records
from lss_jax.tasks import make_task
from lss_jax.training.setup import validate

PAIRS = {
    **{"task": "sequence_to_sequence", "model__family": "encoder_decoder", "model__vocab": 257},
    **{"data__source_len": 24, "data__seq_len": 16, "data__batch_size": 2},
}


def test_a_device_reads_of_both_sides_its_own_segments_and_one_byte_more():
    config = small_config(**PAIRS, attention__layout="contiguous")
    watched = Watched(np.arange(100, dtype=np.uint8))
    windows = PairWindows(Stream(watched, Packing(np.array([40, 100]), np.array([24, 80])), None))
    batch = make_task(config).read([windows[0], windows[1]], 0, mesh_of(2, 4), None)
    sources = [(start + 6 * part, start + 6 * part + 6) for start in (0, 40) for part in range(4)]
    targets = [(start + 4 * part - (part > 0), start + 4 * part + 4) for start in (24, 80) for part in range(4)]
    assert sorted(watched.reads) == sorted(sources + targets), "each once, though tokens and targets both need it"
    np.testing.assert_array_equal(batch.source, [np.arange(24), np.arange(40, 64)])
    np.testing.assert_array_equal(batch.targets, [np.arange(24, 40), np.arange(80, 96)])
    np.testing.assert_array_equal(batch.tokens, [[256, *range(24, 39)], [256, *range(80, 95)]])
    np.testing.assert_array_equal(batch.lengths, [[24, 24], [16, 16]])


@pytest.mark.parametrize("reverse", [False, True])
def test_generated_documents_repeat_their_prompt(reverse):
    data = Repeated(10, 7, reverse=reverse)
    whole = data.read(0, 70)
    assert len(whole) == 70 and set(whole.tolist()) == set(range(10))
    for document in whole.reshape(5, 2, 7):
        np.testing.assert_array_equal(document[1], document[0][::-1] if reverse else document[0])
    np.testing.assert_array_equal(data.read(11, 38), whole[11:38])
    others = Repeated(11, 7, reverse=reverse), Repeated(10, 8, reverse=reverse), Repeated(10, 7, reverse=not reverse)
    assert len({fingerprint(one)["sha256"] for one in (data, *others)}) == 4, "a run knows its data again"


def test_pairs_of_jsonl(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = [(f"question {number} " * (1 + number % 3), f"answer {number}") for number in range(40)]
    lines = [json.dumps({"ask": source, "say": target}) for source, target in texts]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    path = {"data__source": "text", "data__path": str(tmp_path / "chat.jsonl")}
    fields = {"data__prompt_field": "ask", "data__answer_field": "say"}
    config = small_config(**{**PAIRS, **path, **fields, "data__batch_size": 5})  # which does not divide them
    split = make_task(config).splits(mesh_of(1, 1))["train"]
    found = {}
    for index in range(split.batches):
        batch = jax.tree.map(np.asarray, split.evaluation_batch(index))
        for row, (source, target) in enumerate(batch.lengths.T):
            answer, end = batch.targets[row, : max(target - 1, 0)], batch.targets[row, target - 1 : target]
            assert target == 0 or end == [256]
            found |= {bytes(batch.source[row, :source].tolist()): bytes(answer.tolist())}
    expected = {source.encode()[:24]: target.encode() for source, target in texts[: len(found) - 1]}
    assert found == {**expected, b"": b""}, "the last rows are behind the end"
    (told,) = [line for line in make_task(config).introduction(split) if line.startswith("cut")]
    long = sum(len(source) > 24 for source, _ in texts[: len(found) - 1])
    assert told.startswith(f"cut      {long} pairs, with a source longer than data.source_len=24")


REFUSED = {
    "model.vocab=256 is less than 257, which byte-level data with a start token needs": {"model__vocab": 256},
    "model.vocab=64 is less than 65, which data.symbols=64 with a start token needs": {
        "model__vocab": 64,
        "data__source": "copy",
    },
    r"task='sequence_to_sequence' predicts .* from a source as well, which model.family='decoder' does not do; .*"
    "encoder_decoder": {"model__family": "decoder"},
    "task='language_model' predicts each next token, which model.family='encoder_decoder' does not do": {
        "task": "language_model"
    },
    "data.source='stdlib' has no pairs of a source and a target": {"data__source": "stdlib"},
    "attention.window=8 has no use with task='sequence_to_sequence'; use 0": {"attention__window": 8},
    "data.path='x' has no use with data.source=\"copy\"": {"data__source": "copy", "data__path": "x"},
    "data.source_len=0 must be at least 1": {"data__source_len": 0},
    "model.encoder_layers=3 is not divisible by model.remat_every=2": {
        **{"model__encoder_layers": 3, "model__remat": "input", "model__remat_every": 2}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(ConfigError, match=message):
        validate(small_config(**{**PAIRS, "data__source": "text", "data__path": "chat.jsonl", **REFUSED[message]}), 8)


def test_text_without_prompts_is_refused(tmp_path):
    (tmp_path / "plain.txt").write_text("no prompt in it " * 20)
    config = small_config(**PAIRS, data__source="text", data__path=str(tmp_path / "plain.txt"))
    with pytest.raises(
        ConfigError, match=r"has a part without prompts, which task=.sequence_to_sequence. needs; give JSONL"
    ):
        make_task(config).splits(mesh_of(1, 1))


def test_a_token_is_exact_if_no_other_has_a_larger_logit():
    random, mesh = np.random.default_rng(0), mesh_of(1, 1, 4)
    logits_BLV = random.normal(0, 1, (2, 8, 12)).astype(np.float32)
    targets_BL = np.where(random.random((2, 8)) < 0.5, logits_BLV.argmax(-1), random.integers(0, 12, (2, 8)))
    targets_BL[0, :3] = IGNORED
    expected = ((logits_BLV.argmax(-1) == targets_BL) & (targets_BL != IGNORED)).sum()

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(None, None, MODEL), P()), out_specs=P())
    def in_shares(logits_BLV, targets_BL):
        return jax.lax.psum(jax.tree.map(jnp.sum, vocab_parallel_cross_entropy(logits_BLV, targets_BL, MODEL)), MODEL)

    sums = jax.tree.map(jnp.sum, cross_entropy(logits_BLV, targets_BL))
    assert sums.exact == expected and sums.tokens == 13
    assert_close(in_shares(logits_BLV, targets_BL), sums, 1e-5)


TRAINED = {**PAIRS, "data__source": "reverse", "model__vocab": 65, "log_every": 1, "mesh__seq": 8, "mesh__data": 1}


def curve(workdir):
    return [r["loss"] for r in read_records(workdir / "metrics.jsonl") if r["split"] == "train"]


@pytest.mark.grid
def test_twenty_steps_are_the_same_on_another_mesh_and_after_a_stop(tmp_path):
    config = small_config(**TRAINED, attention__source_layout="zigzag")
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_after=7)
    jax.tree.map(np.testing.assert_array_equal, run(config, tmp_path / "parts"), whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 20
    other = {**TRAINED, "mesh__seq": 2, "mesh__data": 2, "mesh__model": 2, "attention__strategy": "ring"}
    run(small_config(**other, attention__layout="contiguous"), tmp_path / "other")
    np.testing.assert_allclose(curve(tmp_path / "other"), curve(tmp_path / "whole"), rtol=1e-5)
