"""The command that continues prompts, and what it refuses."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import random_bytes, small_config

from lss_jax.config.schema import ConfigError
from lss_jax.generate import main, show
from lss_jax.generation.request import check_request
from lss_jax.generation.sampling import Sampling
from lss_jax.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(0.0, None, 1.0, seed=0)


REFUSED = {
    "learned, long prompt": (
        {},
        b"x" * 50,
        1,
        "has 50 bytes, more than data.seq_len=48 learned positions; cut it, or train",
    ),
    "learned, many tokens": ({}, b"x" * 40, 20, "leave room for --tokens=9, not 20; ask for less, or train with a"),
    "within the prefix": ({"attention__prefix": 9}, b"x", 1, "has 1 bytes, less than attention.prefix=9"),
    "documents": ({"data__separator": "||"}, b"a||b", 1, "has data.separator='||' in it"),
    "empty": ({}, b"", 1, "is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_text_can_come_from_is_refused(case):
    changes, prompt, tokens, told = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        check_request(small_config(**changes), [prompt], tokens, GREEDY)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_what_just_fits_is_not_refused():
    check_request(small_config(), [b"x" * 48], 1, GREEDY)
    check_request(small_config(), [b"x" * 40, b"y"], 9, GREEDY)
    check_request(small_config(model__positions="rope"), [b"x" * 400], 900, GREEDY)


def test_texts_are_shown_as_they_grow_and_broken_characters_as_such(capsys):
    accent, euro = "é".encode(), "€".encode()
    shown = []

    def bytes_of_two_rows():
        for first, second in zip(accent[1:] + euro + b"\xff.", b"abcde" + accent[:1], strict=True):
            shown.append(capsys.readouterr().out)
            yield [bytes([first]), bytes([second])]
        shown.append(capsys.readouterr().out)

    show(bytes_of_two_rows(), [b"1:" + accent[:1], b"2:"])
    assert shown == ["--- 1 of 2\n1:", "é", "", "", "€", "\ufffd", "."]
    assert capsys.readouterr().out == "\n--- 2 of 2\n2:abcde\ufffd\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text").write_bytes(random_bytes().tobytes())
    source = {"data__source": "text", "data__path": str(folder / "text")}
    config = small_config(mesh__data=1, mesh__seq=-1, model__layers=1, optim__steps=2, eval_batches=1, **source)
    trainer = Trainer(config, folder / "run", jax.devices()[:1])
    assert list(trainer.fit())
    trainer.close()
    return folder / "run"


def command(*arguments):
    line = [sys.executable, "-m", "lss_jax.generate", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, timeout=300)


def test_the_command_prints_the_same_text_on_every_mesh(workdir):
    (workdir.parent / "prompt").write_bytes(b"from \xff file")
    asked = ["--workdir", workdir, "--prompt", "Zoë", "--prompt-file", workdir.parent / "prompt", "--tokens", 9]
    shown = command(*asked, "--top-k", 40)
    assert shown.returncode == 0, shown.stderr
    assert (
        shown.stdout.startswith("--- 1 of 2\nZoë".encode()) and "--- 2 of 2\nfrom \ufffd file".encode() in shown.stdout
    )
    assert b"devices  8 cpu, mesh data=1 x seq=8 x model=1" in shown.stderr and b"MiB per device" in shown.stderr
    other = command(*asked, "--top-k", 40, "--config.mesh.data=2", "--config.mesh.seq=2", "--config.mesh.model=2")
    assert (other.returncode, other.stdout) == (0, shown.stdout), other.stderr


def errors_of(*arguments) -> list[str]:
    failed = command(*arguments)
    lines = failed.stderr.decode().splitlines()
    assert failed.returncode == 2 and failed.stdout == b"" and all(line.startswith("error: ") for line in lines), lines
    return lines


def test_all_that_is_wrong_is_told_at_once(workdir):
    wrong = {
        "--temperature=-1": "must be at least 0",
        "--top-k=0": "leaves no token; use at least 1",
        "--top-p=1.5": "must be greater than 0 and at most 1",
        "--tokens=0": "must be at least 1",
        "--prompt=": "the prompt is empty",
    }
    lines = errors_of("--workdir", workdir, *wrong)
    assert len(lines) == len(wrong)
    for told in wrong.values():
        assert any(told in line for line in lines), told


def test_a_mesh_unlike_the_devices_is_refused(workdir):
    (line,) = errors_of("--workdir", workdir, "--prompt=a", "--tokens=9", "--config.mesh.data=1", "--config.mesh.seq=3")
    assert "needs 3 devices, but 8 are found" in line


def test_missing_and_foreign_runs_are_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"name": "of another program"}')
    for workdir, told in (
        (tmp_path / "no", "config.json cannot be read"),
        (tmp_path, "is not a config of this program"),
    ):
        monkeypatch.setattr(sys, "argv", ["generate", "--workdir", str(workdir), "--prompt=a"])
        with pytest.raises(ConfigError, match=told):
            main()


def test_a_damaged_checkpoint_is_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (line,) = errors_of("--workdir", tmp_path / "run", "--prompt=a", "--tokens=9")
    assert "no sound checkpoint is left" in line
