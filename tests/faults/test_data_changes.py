"""Data files that shrink, change or vanish under a run, or between two."""

import os

import jax
import numpy as np
import pytest
from helpers import sampled, small_config
from processes import write_text

from lss_jax.config.schema import ConfigError, RunError
from lss_jax.data import sources
from lss_jax.data.sources import fingerprint, open_splits
from lss_jax.training.trainer import Trainer


def shrink(path):
    os.truncate(path, 5_000)


def rewrite(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.replace(other, path)


def remove(path):
    path.unlink()


CHANGES = {shrink: r"ends before byte \d+|has 5000 bytes now", rewrite: "was written to", replace: "was written to"}
CHANGES |= {remove: r"cannot be found any more \(No such file or directory\)"}


def trainer_of(path, workdir):
    changes = {"log_every": 1, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 4, "optim__steps": 12}
    config = small_config(mesh__data=2, model__layers=1, data__source="text", data__path=str(path), **changes)
    return Trainer(config, workdir, jax.devices()[:2])


@pytest.mark.parametrize("change", sampled(CHANGES, [rewrite], rest=pytest.mark.faults))
def test_a_change_under_a_run_ends_it_before_it_is_saved(tmp_path, change):
    text = write_text(tmp_path)
    trainer = trainer_of(text, tmp_path / "run")
    with pytest.raises(RunError, match=rf"data.path='.*text' had 20000 bytes.*({CHANGES[change]}); put the file back"):
        for record in trainer.fit():
            if record["step"] == 5:
                change(text)
    trainer.close()
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved == ["4"], "nothing is saved that may come from other data"


@pytest.mark.parametrize("change", sampled(CHANGES, [replace], rest=pytest.mark.faults))
def test_a_change_between_two_runs_is_refused(tmp_path, change):
    text = write_text(tmp_path)
    trainer = trainer_of(text, tmp_path / "run")
    next(trainer.fit())
    trainer.save()
    trainer.close()
    change(text)
    wanted = "is not a file" if change is remove else "bytes with fingerprint .* was trained on 20000 bytes with"
    with pytest.raises(ConfigError, match=wanted):
        trainer_of(text, tmp_path / "run")


def test_new_data_under_a_new_name_is_welcome(tmp_path):
    text = write_text(tmp_path)
    trainer = trainer_of(text, tmp_path / "run")
    next(trainer.fit())
    trainer.save()
    trainer.close()
    other = tmp_path / "other"
    other.write_bytes(text.read_bytes()[::-1])
    again = trainer_of(other, tmp_path / "run")
    again.close()
    assert again.step == 1 and "data.path" in again.changes


def test_a_long_file_is_fingerprinted_by_blocks_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE", 4 * sources.BLOCK)
    path = tmp_path / "long"
    path.write_bytes(bytes(100_000))

    def now():
        config = small_config(data__source="text", data__path=str(path)).data
        return fingerprint(open_splits(config)["train"].source)

    whole = now()
    for place in (0, 99_999):
        content = np.zeros(100_000, np.uint8)
        content[place] = 1
        path.write_bytes(content.tobytes())
        assert now() != whole
