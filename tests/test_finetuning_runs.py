"""Whole runs that train a part of their parameters: resume, other meshes, evaluation, generation, bad changes."""

import jax
import numpy as np
import pytest
from helpers import TEXT, change, run, sampled, small_config

from lss_jax.config.schema import ConfigError
from lss_jax.generation.generate import generate_text
from lss_jax.reports.summary import introduction
from lss_jax.storage.metrics import read_records
from lss_jax.training.evaluation import evaluate_run
from lss_jax.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tmp_path_factory.mktemp("run") / "text"
    text.write_bytes(TEXT)
    changes = {"log_every": 2, "eval_every": 4, "eval_batches": 2, "checkpoint_every": 4, "optim__steps": 8}
    return small_config(mesh__seq=4, data__source="text", data__path=str(text), lora__rank=2, **changes)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an uninterrupted run, which is not to be changed, and its final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(config, workdir)


def losses(workdir):
    return [record["loss"] for record in read_records(workdir / "metrics.jsonl")]


def test_an_interrupted_run_of_adapters_ends_like_an_uninterrupted_one(config, tmp_path, whole):
    """Bit for bit; and its first line says how little is trained."""
    run(config, tmp_path, stop_after=4)
    trainer = Trainer(config, tmp_path)
    assert "parameters, 512 of them trained (1.44%), " in introduction(trainer)
    trainer.close()
    jax.tree.map(np.testing.assert_array_equal, run(config, tmp_path), whole[1])
    assert losses(tmp_path) == losses(whole[0])


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ((2, 2, 2), {"mesh__shard": "all", "optim__offload": True}),
        pytest.param((1, 3, 1), {"mesh__shard": "all", "model__tile": 5}, marks=pytest.mark.grid),
        pytest.param((2, 2, 2), {"mesh__shard": "optimizer"}, marks=pytest.mark.grid),
    ],
)
def test_adapters_go_on_with_the_same_curve_on_another_mesh(config, tmp_path, whole, sizes, changes):
    run(config, tmp_path, stop_after=4)
    data, seq, model = sizes
    other = change(config, mesh__data=data, mesh__seq=seq, mesh__model=model, **changes)
    run(other, tmp_path, devices=jax.devices()[: data * seq * model])
    np.testing.assert_allclose(losses(tmp_path), losses(whole[0]), rtol=1e-5)


def test_a_run_of_adapters_is_evaluated_and_continues_prompts(config, whole):
    """With the adapters in it: the loss is that of the run, and on a hybrid the text is the same."""
    folder, _ = whole
    assert evaluate_run(folder, "valid", batches=2)["loss"] == pytest.approx(losses(folder)[-1], rel=1e-6)
    texts = [
        generate_text(folder, "ab", tokens=5, temperature=0.0, config=other)
        for other in (config, change(config, mesh__data=2, mesh__seq=2, mesh__model=2))
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__frozen": "stack/*"}, r"optim.frozen='', not 'stack/\*', and its moments do not fit"),
        ({"lora__rank": 0}, r"lora.rank=2, not 0, and its parameters do not fit"),
        ({"lora__targets": "query"}, r"lora.targets='query,value', not 'query', and its parameters do not fit"),
    ],
)
def test_a_run_goes_on_with_what_it_trains(config, whole, changes, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(change(config, **changes), whole[0])


def test_a_run_that_goes_on_with_another_scale_says_so(config, tmp_path):
    run(config, tmp_path, stop_after=2)
    trainer = Trainer(change(config, lora__alpha=8.0), tmp_path)
    trainer.close()
    assert "changed  lora.alpha from 16.0 to 8.0" in introduction(trainer)


ELSEWHERE = {"mesh__data": 2, "mesh__seq": 2, "mesh__model": 2, "mesh__shard": "all"}
FROZEN = {"lora__rank": 0, "optim__frozen": "stack/blocks/attention/*"}


@pytest.mark.parametrize("changes", sampled([ELSEWHERE, FROZEN], [FROZEN]), ids=["adapters elsewhere", "frozen"])
def test_a_run_starts_from_another_run(config, tmp_path, changes):
    """With its loss, before a step is taken; and what is frozen stays that of the other run, bit for bit."""
    config = change(config, optim__steps=2, eval_every=0)
    base = run(change(config, lora__rank=0), tmp_path / "base")
    tuned = change(change(config, start_from=str(tmp_path / "base")), **changes)
    trainer = Trainer(tuned, tmp_path / "tuned")
    assert f"start    with the parameters in {tmp_path}/base" in introduction(trainer)
    assert trainer.step == 0
    expected = evaluate_run(tmp_path / "base", "valid", batches=2)["loss"]
    assert trainer.evaluate("valid", 2)["loss"] == pytest.approx(expected, rel=1e-5)
    list(trainer.fit())
    trainer.close()
    state = trainer.state
    before, after = (state.params["stack"]["blocks"]["attention"] for state in (base, state))
    for name in ("query", "key", "value", "out"):
        np.testing.assert_array_equal(after[name]["kernel"], before[name]["kernel"])
    moved = np.any(state.params["final_norm"]["scale"] != base.params["final_norm"]["scale"])
    assert moved == (tuned.lora.rank == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__width": 64}, r"start_from='.*' is a run with model.width=32, not 64, and its parameters do not fit"),
        ({"lora__rank": 3}, r"is a run with lora.rank=2, not 3, and its parameters do not fit; .*config.lora.rank=2"),
        ({"start_from": "nowhere"}, r"nowhere/config.json cannot be read"),
    ],
)
def test_a_run_that_cannot_start_from_another_is_refused_untouched(config, tmp_path, whole, changes, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(change(change(config, start_from=str(whole[0])), **changes), tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
