"""Whole runs, in this process: resume, other meshes, metrics, and bad workdirs."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import TEXT, change, run, small_config

from lss_jax.config.schema import ConfigError
from lss_jax.generation.generate import generate_text
from lss_jax.reports.summary import introduction
from lss_jax.storage.metrics import MetricsWriter, console_line, duration, read_records
from lss_jax.storage.workdir import saved_config
from lss_jax.training import host
from lss_jax.training.evaluation import evaluate_run
from lss_jax.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tmp_path_factory.mktemp("run") / "text"
    text.write_bytes(TEXT)
    changes = {"log_every": 2, "eval_every": 4, "eval_batches": 2, "checkpoint_every": 5, "optim__steps": 10}
    return small_config(mesh__seq=4, data__source="text", data__path=str(text), **changes)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an uninterrupted run, which is not to be changed, and its final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(config, workdir)


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped")
    run(config, workdir, stop_after=2)
    return workdir


@pytest.fixture
def interrupted(stopped, tmp_path):
    """The folder of a run that stopped after step 2: a copy of its own for each test."""
    return shutil.copytree(stopped, tmp_path / "interrupted")


def contents(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def curve(workdir, split="train"):
    return [(r["step"], r["loss"]) for r in read_records(workdir / "metrics.jsonl") if r["split"] == split]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.quick
def test_an_interrupted_run_ends_like_an_uninterrupted_one(config, tmp_path, whole):
    folder, state = whole
    run(config, tmp_path / "parts", stop_after=2)
    run(config, tmp_path / "parts", stop_after=6)
    parts = run(config, tmp_path / "parts")
    assert_equal(parts, state)
    assert curve(tmp_path / "parts") == curve(folder)
    assert curve(tmp_path / "parts", "valid") == curve(folder, "valid")
    assert [step for step, _ in curve(folder)] == [2, 4, 6, 8, 10]
    assert [step for step, _ in curve(folder, "valid")] == [4, 8, 10]


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param((8, 1, 1), {}, marks=pytest.mark.grid),
        pytest.param((2, 3, 1), {}, marks=pytest.mark.grid),
        pytest.param((1, 1, 1), {}, marks=pytest.mark.grid),
        pytest.param((1, 3, 2), {"model__vocab_parallel": True}, marks=pytest.mark.grid),
        pytest.param((2, 2, 2), {"mesh__shard": "optimizer"}, marks=pytest.mark.grid),
        pytest.param((2, 4, 1), {"mesh__shard": "all"}, marks=pytest.mark.grid),
        pytest.param((1, 8, 1), {"mesh__shard": "all", "optim__offload": True}, marks=pytest.mark.grid),
        ((1, 3, 1), {"mesh__shard": "all", "model__remat": "offload", "model__tile": 5, "optim__offload": True}),
    ],
)
def test_another_mesh_goes_on_with_the_same_curve(config, tmp_path, whole, sizes, changes):
    """Also one that cuts weights, another share of the vocabulary, or moments."""
    run(config, tmp_path / "parts", stop_after=4)
    data, seq, model = sizes
    other = change(change(config, mesh__data=data, mesh__seq=seq, mesh__model=model), **changes)
    run(other, tmp_path / "parts", devices=jax.devices()[: data * seq * model])
    found, expected = curve(tmp_path / "parts"), curve(whole[0])
    assert [step for step, _ in found] == [step for step, _ in expected]
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in expected], rtol=1e-5)


def test_offload_on_cpu_is_said_to_do_nothing(config, tmp_path):
    inputs, state = {"model__remat": "offload"}, {"mesh__shard": "all", "optim__offload": True}
    for number, (changes, lines) in enumerate([(inputs, 1), (state, 1), ({}, 0)]):
        trainer = Trainer(change(config, **changes), tmp_path / str(number))
        assert introduction(trainer).count("offload  does nothing here: cpu devices have no memory but") == lines
        trainer.close()


def test_a_state_on_the_host_is_evaluated_and_continues_prompts(config, tmp_path, whole):
    """As one on the devices, whose run it goes on with."""
    state = {"mesh__shard": "all", "optim__offload": True}
    run(change(config, **state), tmp_path / "state")
    expected, found = (evaluate_run(folder, "valid", batches=2) for folder in (whole[0], tmp_path / "state"))
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    texts = [generate_text(folder, "ab", tokens=5, temperature=0.0) for folder in (whole[0], tmp_path / "state")]
    assert texts[0] == texts[1]


def test_host_memory_that_is_not_there_is_refused(config, tmp_path, monkeypatch):
    """As if these devices had memory of their own, and their host none or little."""
    monkeypatch.setattr(host, "has_host_memory", lambda _: True)
    config = change(config, model__remat="offload", mesh__shard="all", optim__offload=True)
    little = r"optim.offload=True asks each of the 8 devices of .* has 0.25 MiB .*larger model.remat_every"
    wrong = r"cpu devices cannot reach the host's memory; use model.remat='block' and optim.offload=False"
    for name, replacement, message in (("memory_of_this_host", lambda: 2**18, little), ("HOST", "another", wrong)):
        with monkeypatch.context() as patch:
            patch.setattr(host, name, replacement)
            with pytest.raises(ConfigError, match=message):
                Trainer(config, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


@pytest.mark.grid
def test_muon_goes_on_with_the_same_curve_on_another_mesh(config, tmp_path):
    config = change(config, optim__name="muon")
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_after=4)
    run(change(config, mesh__data=1, mesh__seq=8), tmp_path / "parts")
    found, expected = curve(tmp_path / "parts"), curve(tmp_path / "whole")
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in expected], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"optim.name='muon', not 'adamw', and its moments do not fit"):
        Trainer(change(config, optim__name="adamw"), tmp_path / "parts")


@pytest.mark.grid
def test_a_length_that_only_one_mesh_divides(config, tmp_path):
    """Its position table is whole on 2 x 4 devices and cut on 1 x 3; the checkpoint and the curve are the same."""
    config = change(config, data__seq_len=45)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_after=4)
    other = change(config, mesh__data=1, mesh__seq=3, attention__layout="contiguous")
    run(other, tmp_path / "parts", devices=jax.devices()[:3])
    np.testing.assert_allclose(
        [loss for _, loss in curve(tmp_path / "parts")], [loss for _, loss in curve(tmp_path / "whole")], rtol=1e-5
    )


def test_a_prefix_longer_than_a_split_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"attention.prefix=2500 leaves nothing to predict in a split of 2400 "):
        Trainer(change(config, data__seq_len=3000, attention__prefix=2500), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_has_nothing_left_to_do_and_can_be_prolonged(config, tmp_path, whole):
    folder, done = whole
    shutil.copytree(folder, tmp_path / "run")
    assert_equal(run(config, tmp_path / "run"), done)
    longer = run(change(config, optim__steps=12), tmp_path / "run")
    assert longer.step == 12
    assert [step for step, _ in curve(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


def test_a_trainer_can_be_left_and_called_again(config, tmp_path, whole):
    trainer = Trainer(config, tmp_path / "parts")
    for record in trainer.fit():
        if record["step"] == 6:
            break
    assert trainer.step == 6
    for record in trainer.fit():
        if record["step"] == 8:
            break  # at the training record: the evaluation that is due is made and written all the same
    list(trainer.fit())
    trainer.close()
    assert_equal(jax.tree.map(np.asarray, trainer.state), whole[1])
    assert curve(tmp_path / "parts", "valid") == curve(whole[0], "valid")


def test_old_checkpoints_are_deleted_and_hold_global_shapes_alone(config, tmp_path):
    state = run(change(config, checkpoint_every=2), tmp_path / "run")._asdict()
    folders = sorted(int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir() if f.name.isdigit())
    assert folders == [8, 10]
    plain = ocp.StandardCheckpointer()
    saved = tmp_path / "run" / "checkpoints" / "10"
    for item in ("params", "opt_state"):  # read without any word about devices
        assert_equal(plain.restore(saved / item, jax.tree.map(np.zeros_like, state[item])), state[item])


def test_metrics_have_the_promised_keys(whole):
    folder, _ = whole
    for record in read_records(folder / "metrics.jsonl"):
        keys = {"step", "split", "loss", "bits_per_byte"}
        if record["split"] == "train":
            keys |= {"learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "skipped"}
        assert set(record) == keys
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / np.log(2))
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_metrics_after_the_checkpoint_are_dropped_and_half_lines_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": "train", "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "sp')
    writer = MetricsWriter(tmp_path, resumed_step=2)
    writer.write({"step": 3, "split": "train", "loss": 2.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_console_lines_tell_rate_and_time_left():
    record = {"step": 10, "split": "train", "loss": 2.0, "bits_per_byte": 2.9, "learning_rate": 1e-3}
    record |= {"grad_norm": 0.5, "tokens_per_second": 1234.5, "step_seconds": 2.0}
    assert console_line(record, 100, "loss 2.0000  2.9000 bits/byte") == (
        "step  10/100  train loss 2.0000  2.9000 bits/byte  lr 1.00e-03  |grad| 0.50  1,234 tokens/s  3m00s left"
    )
    assert [duration(s) for s in (4, 184, 7500)] == ["4s", "3m04s", "2h05m"]


def test_a_workdir_of_another_model_is_refused_untouched(config, interrupted):
    before = contents(interrupted)
    other = change(config, model__width=64, model__heads=8, data__seq_len=24)
    with pytest.raises(ConfigError) as error:
        Trainer(other, interrupted)
    told = str(error.value).split("\n")
    assert len(told) == 3
    assert "holds a run with model.width=32, not 64, and its parameters do not fit" in told[0]
    assert told[0].endswith("choose another --workdir, or go on with --config.model.width=32")
    assert "data.seq_len=48, not 24" in told[2], "the learned position table has a row per position"
    assert contents(interrupted) == before


def test_a_workdir_without_a_checkpoint_takes_any_model(config, tmp_path):
    Trainer(config, tmp_path / "run").close()
    trainer = Trainer(change(config, model__width=64), tmp_path / "run")
    trainer.close()
    assert trainer.step == 0


def test_a_run_that_goes_on_tells_what_changed(config, interrupted):
    trainer = Trainer(change(config, optim__steps=12, log_every=1), interrupted)
    trainer.close()
    assert trainer.changes == {"optim.steps": (10, 12), "log_every": (2, 1)}


def test_a_foreign_config_is_named(tmp_path):
    for text in ("[]", "{}", "{", '{"seed": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config.json is not .*; .*another --workdir"):
            saved_config(tmp_path)


def test_a_workdir_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"is not a folder that can be written to; choose another"):
        Trainer(config, tmp_path / "file" / "run")


def test_bad_input_leaves_nothing_behind(config, tmp_path):
    for bad in (change(config, mesh__seq=3), change(config, data__path=str(tmp_path / "nothing"))):
        with pytest.raises(ConfigError):
            Trainer(bad, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_one_error(config, interrupted):
    for file in (interrupted / "checkpoints" / "2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = contents(interrupted)
    with pytest.raises(ConfigError, match=r"no sound checkpoint is left: .*checkpoints/2 \(.*\); put one back"):
        Trainer(change(config, optim__steps=12), interrupted)
    assert contents(interrupted) == before


def test_a_run_of_muon_is_evaluated_and_generates_where_it_could_not_train(config, tmp_path):
    """Muon needs whole matrices, which a `model` axis shards; parameters do not care."""
    trainer = Trainer(change(config, optim__name="muon", optim__steps=2, optim__warmup_steps=1), tmp_path)
    list(trainer.fit())
    trainer.close()
    trained = evaluate_run(tmp_path, batches=1)
    hybrid = change(trainer.config, mesh__data=2, mesh__seq=2, mesh__model=2)
    assert evaluate_run(tmp_path, batches=1, config=hybrid)["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert len(generate_text(tmp_path, "ab", tokens=3, temperature=0, config=hybrid)) == 5
    with pytest.raises(ConfigError, match=r"mesh.model=2 shards the matrices of layers"):
        Trainer(hybrid, tmp_path)
