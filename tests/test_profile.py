"""Profiles: real runs write traces of the steps that they were asked for, and of no others."""

import gzip
import json

import jax
import pytest
from helpers import TEXT, change, small_config

from lss_jax.config.schema import ConfigError
from lss_jax.training.profile import STEP
from lss_jax.training.setup import validate
from lss_jax.training.trainer import Trainer


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    small = {"model__layers": 1, "log_every": 2, "eval_every": 0, "eval_batches": 1, "optim__steps": 10}
    data = {"data__source": "text", "data__path": str(tmp_path / "text")}
    return small_config(mesh__seq=2, profile__start=3, profile__steps=4, **small, **data)


def train(config, workdir, stop_after=None):
    trainer = Trainer(config, workdir, jax.devices()[:2])
    for _ in trainer.fit(lambda step: stop_after is None or step <= stop_after):
        pass
    if stop_after is not None:
        trainer.save()
    trainer.close()


def traced(workdir):
    """The steps of each trace, as XProf finds them, in the order of the traces."""
    return [steps_in(file) for file in sorted((workdir / "profile").rglob("*.xplane.pb"))]


def steps_in(file):
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == STEP
    ]
    return sorted(dict(event.stats)["step_num"] for event in events)


def test_a_run_traces_the_steps_that_it_was_asked_for(config, tmp_path):
    """In both formats, and training is what it is without a trace."""
    train(config, tmp_path / "run")
    assert traced(tmp_path / "run") == [[3, 4, 5, 6]]
    (file,) = (tmp_path / "run" / "profile").rglob("*.trace.json.gz")
    with gzip.open(file) as opened:
        events = json.load(opened)["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == STEP] == list("3456")
    assert any(event.get("name") == "Rendezvous" for event in events), "devices met in collectives"


def test_an_interrupted_trace_is_closed_and_the_rest_traced_later(config, tmp_path):
    """After it nothing is traced any more."""
    train(config, tmp_path / "run", stop_after=4)
    assert traced(tmp_path / "run") == [[3, 4]]
    train(config, tmp_path / "run", stop_after=8)
    assert traced(tmp_path / "run") == [[3, 4], [5, 6]]
    train(config, tmp_path / "run")
    assert traced(tmp_path / "run") == [[3, 4], [5, 6]]


@pytest.mark.grid
def test_a_run_that_ends_or_fails_within_its_trace_closes_it(config, tmp_path):
    train(change(config, optim__steps=4), tmp_path / "short")
    assert traced(tmp_path / "short") == [[3, 4]]
    trainer = Trainer(config, tmp_path / "fails", jax.devices()[:2])
    with pytest.raises(KeyboardInterrupt):
        for record in trainer.fit():
            assert record["step"] <= 4
            if record["step"] == 4:
                raise KeyboardInterrupt
    trainer.close()
    assert traced(tmp_path / "fails") == [[3, 4]]


def test_without_steps_there_is_no_folder(config, tmp_path):
    train(change(config, profile__steps=0, optim__steps=4), tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.faults
def test_a_trace_that_cannot_be_written_ends_no_run(config, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    train(config, tmp_path / "run")
    (message,) = caplog.messages
    assert message.startswith(f"the profile in {tmp_path}/run/profile cannot be written: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"profile__start": 21},
            "profile.start=21 is beyond the last step, optim.steps=20; trace from an",
        ),
        ({"profile__start": 0}, "profile.start=0 must be at least 1"),
        ({"profile__steps": -1}, "profile.steps=-1 must be at least 0"),
    ],
)
def test_what_cannot_be_traced_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(small_config(**{"profile__steps": 1, **changes}), 8)
