"""The command lines as a user calls them: real processes, real signals, exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TEXT, sampled

from lss_jax.storage.metrics import read_records

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config.mesh.data=2",
    "--config.model.layers=1",
    "--config.model.width=32",
    "--config.data.seq_len=64",
    "--config.data.batch_size=4",
    "--config.optim.warmup_steps=2",
    "--config.eval_batches=1",
    "--config.log_every=5",
]


def command(module, *arguments):
    return [sys.executable, "-m", f"lss_jax.{module}", *map(str, arguments)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What is trained on: short, so that a whole split is evaluated at once."""
    path = tmp_path_factory.mktemp("cli") / "text"
    path.write_bytes(TEXT)
    return [f"--config.data.path={path}", "--config.data.source=text"]


def train(workdir, *arguments):
    return command("train", "--config", "configs/default.py", "--workdir", workdir, *SMALL, *arguments)


def call(arguments):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_train_then_evaluate_then_train_on(tmp_path, text):
    workdir = tmp_path / "run"
    done = call(train(workdir, *text, "--config.optim.steps=20"))
    assert done.returncode == 0, done.stderr
    assert "devices  8 cpu, mesh data=2 x seq=4 x model=1" in done.stdout
    assert "tokens/s" in done.stdout and "left" in done.stdout
    for told in ("done after 20 of 20 steps", "train  ", "valid  ", "speed  ", f"files  {workdir}", "next:"):
        assert told in done.stdout.split("\n\n")[1]
    records = read_records(workdir / "metrics.jsonl")
    assert records[0]["loss"] > records[-1]["loss"]

    evaluated = call(command("evaluate", "--workdir", workdir, "--batches", 1, "--config.mesh.data=1"))
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout == (
        f"step 20  valid  loss {records[-1]['loss']:.4f} nats/byte  {records[-1]['bits_per_byte']:.4f} bits/byte\n"
    ), "another mesh gives the number that training ended with"

    tested = call(command("evaluate", "--workdir", workdir, "--split", "test", "--config.data.batch_size=256"))
    assert tested.returncode == 0, tested.stderr
    assert [r["split"] for r in read_records(workdir / "metrics.jsonl")][-2:] == ["valid", "test"]

    again = call(train(workdir, *text, "--config.optim.steps=20"))
    assert again.returncode == 0 and "going on after step 20" in again.stdout
    assert json.loads((workdir / "config.json").read_text())["model"]["mlp_width"] == 128


@pytest.mark.parametrize("number", sampled([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]))
def test_a_signal_ends_the_run_after_the_step_and_the_same_command_goes_on(tmp_path, text, number):
    endless = train(tmp_path, *text, "--config.optim.steps=100000", "--config.checkpoint_every=100000")
    process = subprocess.Popen(endless, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 128 + number
    step = int(rest.split("stopped after step ")[1].split(",")[0])
    assert step >= 5
    assert (tmp_path / "checkpoints" / str(step)).is_dir(), "the step in hand was saved"


BAD = {
    "--config.mesh.data=1 --config.mesh.seq=3": "needs 3 devices, but 8 are found",
    "--config.data.batch_size=3": "data.batch_size=3 is not divisible by mesh.data=2",
    "--config.model.heads=5": "model.width=32 is not divisible by model.heads=5",
    "--config.modle.heads=5": "did you mean 'model.heads'?",
    "--config.data.source=text --config.data.path=nothing": "data.path='nothing' is not a file",
}


@pytest.mark.parametrize("changes", sampled(BAD, list(BAD)[:1]))  # all in one process: faults/test_bad_input.py
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, changes):
    failed = call(train(tmp_path / "run", *changes.split()))
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1, failed.stderr
    assert BAD[changes] in failed.stderr
    assert not (tmp_path / "run").exists()


def test_the_number_of_simulated_devices_is_the_users(tmp_path):
    for variable in ({"JAX_NUM_CPU_DEVICES": "2"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}):
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")} | variable
        failed = subprocess.run(
            train(tmp_path / "run", "--config.mesh.data=5"), cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert "but 2 are found" in failed.stderr


def test_help_and_missing_runs(tmp_path):
    helped = call(command("train", "--help"))
    assert helped.returncode == 0 and "--workdir" in helped.stdout and "--config.KEY=VALUE" in helped.stdout
    failed = call(command("evaluate", "--workdir", tmp_path))
    assert failed.returncode == 2
    assert "config.json cannot be read (No such file or directory); give the --workdir of a training" in failed.stderr
    assert list(tmp_path.iterdir()) == []
