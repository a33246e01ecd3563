"""A table of damage: what is restored is what was saved at that step, or it is refused; never anything else."""

import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import small_config
from processes import write_text

from lss_jax.config.schema import ConfigError
from lss_jax.storage.checkpoint import newest_step
from lss_jax.training.trainer import Trainer

OLD, NEW = 2, 4
ITEMS = ("params", "opt_state")
FILES = [  # patterns below the folder of a step; of many files the largest
    "_CHECKPOINT_METADATA",
    "manifest/metadata",
    *(f"{item}/{file}" for item in ITEMS for file in ("_METADATA", "_sharding", "manifest.ocdbt", "d/*")),
    *(f"{item}/ocdbt.process_0/{file}" for item in ITEMS for file in ("manifest.ocdbt", "d/*")),
    *(f"{item}/array_metadatas/*" for item in ITEMS),
]
DAMAGES = {
    "deleted": lambda content: None,
    "emptied": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "first byte flipped": lambda content: bytes([content[0] ^ 0x10]) + content[1:],
    "middle byte flipped": lambda content: _flipped(content, len(content) // 2),
    "last byte flipped": lambda content: content[:-1] + bytes([content[-1] ^ 0x01]),
}
QUICK = [
    ("params/ocdbt.process_0/d/*", "middle byte flipped"),
    ("params/_METADATA", "emptied"),
    ("manifest/metadata", "truncated"),
    ("opt_state/manifest.ocdbt", "deleted"),
]


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints, its trainer, and what was in each."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(
        mesh__data=2,
        model__layers=1,
        data__source="text",
        data__path=str(write_text(folder)),
        eval_batches=1,
        checkpoint_every=2,
        optim__steps=NEW,
        log_every=2,
    )
    trainer = Trainer(config, folder / "run", jax.devices()[:2])
    states = {}
    for record in trainer.fit():
        if record["split"] == "train":
            states[record["step"]] = jax.tree.map(np.asarray, (trainer.state.params, trainer.state.opt_state))
    trainer.close()
    return trainer, states


def damage(step: Path, pattern: str, kind: str) -> None:
    file = max(step.glob(pattern), key=lambda path: path.stat().st_size)
    content = DAMAGES[kind](file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def check(run, tmp_path, caplog, steps, do) -> None:
    """Damages these steps in a copy and restores: the newest whose values are as saved, or nothing at all."""
    trainer, states = run
    folder = shutil.copytree(trainer.workdir / "checkpoints", tmp_path / "checkpoints")
    for step in steps:
        do(folder / str(step))
    logger = logging.getLogger("lss_jax")
    logger.addHandler(caplog.handler)
    try:
        found = trainer._restored(folder)
    except ConfigError as error:
        assert set(steps) == {OLD, NEW}, "a sound checkpoint was there"
        assert str(error).startswith("no sound checkpoint is left: ") and "\n" not in str(error)
        assert all(str(folder / str(step)) in str(error) for step in steps)
        return
    finally:
        logger.removeHandler(caplog.handler)
    told = list({record.getMessage() for record in caplog.records if record.name.startswith("lss_jax")})
    assert found is not None
    if found.step == NEW:
        assert told == [], "nothing that matters was damaged"
    else:
        assert len(told) == 1 and f"{folder / str(NEW)} (" in told[0] and "going on from step 2" in told[0]
    jax.tree.map(np.testing.assert_array_equal, (found.items["params"], found.items["opt_state"]), states[found.step])


@pytest.mark.parametrize(("pattern", "kind"), QUICK)
def test_a_damaged_newest_checkpoint(run, tmp_path, caplog, pattern, kind):
    check(run, tmp_path, caplog, [NEW], lambda step: damage(step, pattern, kind))
    assert caplog.records, "this damage matters"


@pytest.mark.faults
@pytest.mark.parametrize("steps", [[NEW], [OLD, NEW]], ids=["newest", "all"])
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("pattern", FILES)
def test_the_table_of_damage(run, tmp_path, caplog, pattern, kind, steps):
    check(run, tmp_path, caplog, steps, lambda step: damage(step, pattern, kind))


@pytest.mark.faults
@pytest.mark.parametrize("steps", [[NEW], [OLD, NEW]], ids=["newest", "all"])
@pytest.mark.parametrize("what", ["params", "opt_state", "manifest", "all files"])
def test_missing_folders(run, tmp_path, caplog, what, steps):
    def do(step):
        for path in step.iterdir() if what == "all files" else [step / what]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    check(run, tmp_path, caplog, steps, do)


@pytest.mark.parametrize("item", ITEMS)
def test_arrays_of_another_step_are_refused(run, tmp_path, caplog, item):
    """Whole and sound files, but not those that belong there."""

    def swap(step):
        shutil.rmtree(step / item)
        shutil.copytree(step.with_name(str(OLD)) / item, step / item)

    check(run, tmp_path, caplog, [NEW], swap)
    assert caplog.records


def test_a_run_goes_on_from_the_older_one_and_keeps_the_damaged_one_aside(run, tmp_path):
    trainer, states = run
    workdir = shutil.copytree(trainer.workdir, tmp_path / "run")
    damage(workdir / "checkpoints" / str(NEW), "params/ocdbt.process_0/d/*", "middle byte flipped")
    again = Trainer(trainer.config, workdir, jax.devices()[:2])
    assert again.step == OLD
    list(again.fit())
    again.close()
    found = jax.tree.map(np.asarray, (again.state.params, again.state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, found, states[NEW])
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert {str(OLD), str(NEW), f"damaged-{NEW}"} <= names
    assert newest_step(workdir / "checkpoints") == NEW
