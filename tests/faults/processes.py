"""Real processes for the fault tests: training runs as a user starts them, one or many on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.layers": 1,
    "model.width": 32,
    "data.source": "text",
    "data.seq_len": 64,
    "data.batch_size": 8,
    "optim.warmup_steps": 2,
    "eval_every": 0,
    "eval_batches": 1,
    "log_every": 1,
    "checkpoint_every": 5,
    "heartbeat_timeout": 10,
}


def write_text(folder: Path) -> Path:
    """A file with something to learn in it."""
    path = folder / "text"
    path.write_bytes(bytes(np.random.default_rng(0).choice(list(b"abcdefgh     \n"), 20_000).astype(np.uint8)))
    return path


def command(workdir: Path, text: Path, **changes) -> list[str]:
    """A training of a small model; `command(..., optim__steps=7)`."""
    values = SMALL | {"data.path": text} | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return [
        sys.executable,
        "-m",
        "lss_jax.train",
        "--config",
        "configs/default.py",
        "--workdir",
        str(workdir),
        *overrides,
    ]


def start(arguments: list[str], devices: int, **environment: str) -> subprocess.Popen:
    """One process with so many simulated devices; stdout is a pipe of lines, stderr another."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=kept | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_many(arguments: list[str], count: int, devices: int) -> list[subprocess.Popen]:
    """So many processes of one run, with so many devices each."""
    launch = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(count), "--process"]
    return [start([*arguments, *launch, str(index)], devices) for index in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[str, str]:
    """Waits for the end; what it printed since, and its errors. A process that hangs is killed, and the test fails."""
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs:\n{out}\n{err}") from None


def read_until(process: subprocess.Popen, beginning: str) -> str:
    """The first line on stdout that starts so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"ended before {beginning!r}: {process.stderr.read()}")


def kill_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def losses(workdir: Path) -> list[tuple[int, float]]:
    """Step and training loss of every record, as they stand in the file."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if r["split"] == "train"]


def saved(workdir: Path, step: int):
    """Parameters and optimizer state of a checkpoint, read by Orbax alone."""
    folder = (workdir / "checkpoints" / str(step)).absolute()
    return {item: ocp.StandardCheckpointer().restore(folder / item) for item in ("params", "opt_state")}
