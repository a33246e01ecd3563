"""Several processes give the losses of one, and each reads its own segments; they stop and go on together."""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import small_config
from hf_folders import file_of, make_folder
from processes import ROOT, command, finish, free_port, losses, read_until, start, start_many, write_text
from safetensors.numpy import load_file
from token_files import GIVEN, LENGTHS, VOCAB, documents_of, write_tokenizer, write_tokens

from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.training.trainer import Trainer

STEPS = 5
BATCH, LENGTH = 8, 48  # of small_config


def config(text: Path, data: int, seq: int, **changes) -> dict:
    """Changes to `small_config` for a mesh of `data x seq`."""
    mesh = {"mesh__data": data, "mesh__seq": seq, "attention__layout": "contiguous"}
    rest = {"data__source": "text", "data__path": str(text), "log_every": 1, "eval_every": 0, "eval_batches": 1}
    rest |= {"model__layers": 1, "attention__kernel": "dense"}  # quick to compile: each process does it for itself
    return mesh | rest | {"optim__steps": STEPS} | changes


def run_together(processes: int, devices: int, cases: list[dict], folder: Path) -> list[list[dict]]:
    """What each process has to say of each case."""
    port, script = str(free_port()), str(Path(__file__).with_name("child.py"))
    outs = [folder / f"out-{processes}-{index}" for index in range(processes)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    children = [
        start(
            [sys.executable, script, port, str(processes), str(index), str(out), json.dumps(cases)],
            devices,
            PYTHONPATH=path,
        )
        for index, out in enumerate(outs)
    ]
    for child in children:
        _, err = finish(child)
        assert child.returncode == 0, err
    return [json.loads(out.read_text()) for out in outs]


def run_alone(case: dict, workdir: Path) -> list[tuple[int, float]]:
    changes = case["config"]
    count = changes["mesh__data"] * changes["mesh__seq"]
    trainer = Trainer(small_config(**changes), workdir, jax.devices()[:count])
    found = [(r["step"], r["loss"]) for r in trainer.fit() if r["split"] == "train"]
    trainer.close()
    return found


def check_same_losses(processes: int, meshes: list[tuple[int, int]], folder: Path, **changes) -> None:
    text = write_text(folder)
    cases = [{"workdir": str(folder / f"{d}x{s}"), "config": config(text, d, s) | changes} for d, s in meshes]
    found = run_together(processes, 2, cases, folder)
    for number, (case, (data, seq)) in enumerate(zip(cases, meshes, strict=True)):
        expected = run_alone(case, folder / f"alone-{data}x{seq}")
        for process in found:
            np.testing.assert_allclose(process[number]["losses"], expected, rtol=1e-6)
        # Each process has 2 devices: segments of both, or one that both hold. Read ahead: STEPS batches, and the
        # validation batch at the end.
        rows, parts = BATCH // data, min(2, seq)  # of a device's share; segments of one sequence in a process
        held_rows = rows * (2 // parts)
        segment = LENGTH // seq
        allowed = (STEPS + 1) * held_rows * parts * (segment + 1)
        for process in found:
            assert 0 < process[number]["tokens"] <= allowed, (data, seq)
        total = sum(process[number]["tokens"] for process in found)
        assert total <= (STEPS + 1) * BATCH * seq * (segment + 1), "no token is read twice, but those after segments"
    records = (folder / f"{meshes[0][0]}x{meshes[0][1]}" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == STEPS + 1, "process 0 alone writes"


@pytest.mark.faults
def test_two_processes_give_the_losses_of_one(tmp_path):
    check_same_losses(2, [(4, 1), (1, 4), (2, 2)], tmp_path)


@pytest.mark.faults
def test_four_processes_give_the_losses_of_one(tmp_path):
    check_same_losses(4, [(8, 1), (1, 8), (2, 4)], tmp_path)


CONVERT = (  # into files as small as this model
    "from lss_jax import cli, convert\nfrom lss_jax.huggingface import exporting\n"
    "exporting.LARGEST_FILE = 30_000\ncli.run(convert.main)"
)


@pytest.mark.faults
def test_two_processes_bring_a_model_in_train_it_and_bring_it_out(tmp_path):
    """Each writes files of its own; what comes out is what was trained, and before that what came in."""
    make_folder(tmp_path / "theirs", "llama", mesh__seq=4, mesh__data=1)

    def together(*arguments):
        port = str(free_port())
        joined = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process")
        children = [start([sys.executable, *map(str, (*arguments, *joined, n))], devices=2) for n in range(2)]
        for child in children:
            _, err = finish(child)
            assert child.returncode == 0, err

    mesh, workdir = ("--config.mesh.data=1", "--config.mesh.seq=4"), ("--workdir", tmp_path / "run")
    sizes = ("--config.data.seq_len=64", "--config.data.batch_size=4")
    together("-c", CONVERT, "--from-hf", tmp_path / "theirs", *workdir, *mesh, *sizes)
    together("-c", CONVERT, "--to-hf", tmp_path / "same", *workdir)
    text = (f"--config.data.path={write_text(tmp_path)}", "--config.data.source=text")
    steps = ("--config.optim.steps=2", "--config.optim.warmup_steps=1", "--config.eval_every=0")
    together("-m", "lss_jax.train", *workdir, *text, *steps)
    together("-c", CONVERT, "--to-hf", tmp_path / "trained", *workdir)

    def tensors(folder):
        files = sorted(folder.glob("*.safetensors"))
        return len(files), {name: array for file in files for name, array in load_file(file).items()}

    (_, before), (files, same), (_, trained) = (tensors(tmp_path / name) for name in ("theirs", "same", "trained"))
    assert files > 2 and before.keys() == same.keys() == trained.keys()
    assert all(np.array_equal(before[name], same[name]) for name in before)
    assert not any(np.array_equal(before[name], trained[name]) for name in before)
    assert file_of(tmp_path / "theirs").exists() and not list(tmp_path.glob("*.unfinished"))


def packed(folder: Path) -> dict:
    """Changes to a config: two token files of documents with prompts, and a plain text that is encoded on the way."""
    tokenizer = write_tokenizer(folder)
    token_bytes = load_tokenizer(str(tokenizer)).token_bytes
    for seed, name in enumerate(("one", "two")):
        write_tokens(folder / name, documents_of(LENGTHS * 4, GIVEN * 4, seed=seed), token_bytes, tokenizer)
    path = ",".join(str(folder / name) for name in ("one", "two", "text"))
    changes = {"data__path": path, "data__tokenizer": str(tokenizer), "data__weights": (3.0, 1.0, 2.0)}
    return changes | {"data__restart_positions": True, "model__vocab": VOCAB}


@pytest.mark.faults
@pytest.mark.parametrize(("processes", "meshes"), [(2, [(1, 4), (2, 2)]), (4, [(1, 8), (2, 4)])])
def test_processes_read_their_own_segments_of_packed_documents(tmp_path, monkeypatch, processes, meshes):
    """Token files are read so, too, and what has to be encoded is encoded once, by one of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check_same_losses(processes, meshes, tmp_path, **packed(tmp_path))
    made = [file for file in (tmp_path / "cache" / "lss_jax" / "tokens").iterdir() if not file.suffix]
    assert len(made) == 1


@pytest.mark.faults
def test_any_devices_go_on_with_any_checkpoint(tmp_path):
    """Saved on 2 x 4 devices; goes on with 1 x 4, 2 x 3, one device, and two processes of 4."""
    text, step = write_text(tmp_path), 3
    first = {"config": config(text, 2, 4)}
    expected = run_alone(first, tmp_path / "whole")
    for name in ("1x4", "2x3", "1x1", "together"):
        trainer = Trainer(small_config(**first["config"]), tmp_path / name)
        for record in trainer.fit():
            if record["step"] == step:
                break
        trainer.save()
        trainer.close()
    for data, seq in ((1, 4), (2, 3), (1, 1)):
        found = run_alone({"config": config(text, data, seq)}, tmp_path / f"{data}x{seq}")
        assert [s for s, _ in found] == [4, 5]
        np.testing.assert_allclose(found, expected[step:], rtol=1e-5)
    case = {"workdir": str(tmp_path / "together"), "config": config(text, 2, 4)}
    for process in run_together(2, 4, [case], tmp_path):
        np.testing.assert_allclose(process[0]["losses"], expected[step:], rtol=1e-5)
    assert [s for s, _ in losses(tmp_path / "together")] == [1, 2, 3, 4, 5]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_of_two_stops_both_after_the_same_step(tmp_path, number):
    text = write_text(tmp_path)
    run = command(tmp_path / "run", text, optim__steps=100_000, checkpoint_every=100_000)
    first, second = start_many(run, 2, 2)
    read_until(first, "step ")
    second.send_signal(number)
    out, err = finish(first)
    _, other = finish(second)
    assert (first.returncode, second.returncode) == (128 + number, 128 + number), err + other
    step = int(out.split("stopped after step ")[1].split(",")[0])
    assert [s for s, _ in losses(tmp_path / "run")] == list(range(1, step + 1))
    again = start_many(command(tmp_path / "run", text, optim__steps=step + 2), 2, 2)
    for process in again:
        out, err = finish(process)
        assert process.returncode == 0, err
    assert [s for s, _ in losses(tmp_path / "run")] == list(range(1, step + 3)), "each step once"


@pytest.mark.faults
def test_a_mistake_of_one_process_ends_the_others(tmp_path):
    """A data file that is not there on one machine."""
    text = write_text(tmp_path)
    port = free_port()
    launch = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    good = start([*command(tmp_path / "run", text), *launch, "0"], 2)
    bad = start([*command(tmp_path / "run", tmp_path / "nothing"), *launch, "1"], 2)
    _, err = finish(bad)
    assert bad.returncode == 2 and "nothing' is not a file" in err
    _, err = finish(good)
    assert good.returncode == 4, err
    assert "error: process 1 of 2 ended with: data.path=" in err


@pytest.mark.faults
def test_a_launcher_is_understood(tmp_path):
    """Slurm's variables, as srun sets them, in place of the three options."""
    text = write_text(tmp_path)
    slurm = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    run = command(tmp_path / "run", text, optim__steps=3)
    both = [start(run, 2, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    out, err = finish(both[0])
    assert "devices  4 cpu in 2 processes" in out, err
    finish(both[1])
    assert [process.returncode for process in both] == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--coordinator localhost:1234", "give all three, or none to be found by the launcher"),
        pytest.param(
            "--coordinator localhost --processes 2 --process 1",
            "--coordinator must be HOST:PORT",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            "--coordinator localhost:70000 --processes 2 --process 1",
            "a port from 1 to 65535",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            "--coordinator localhost:1234 --processes 2 --process 2",
            "--process must be at least 0 and less than",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_launch_that_cannot_work_is_refused(tmp_path, options, message):
    process = start([*command(tmp_path / "run", write_text(tmp_path)), *options.split()], 2)
    _, err = finish(process)
    assert process.returncode == 2
    assert err.startswith("error: --coordinator=") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()
