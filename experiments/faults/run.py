"""The cost of faults (steps lost and seconds to recover, per kind of fault) and the cost of checkpointing.

    head -c 4000000 enwik8 > enwik8-first-4MB
    python -m experiments.faults.run --data enwik8-first-4MB

Claims: no committed step is lost; a save every 100 steps of the enwik8 config costs less than 2% of a run.

Faults: a small model on two simulated devices, with a checkpoint every 10 steps. Each fault strikes a run after some
time, and the same command is started again. *Lost* are the steps that were done and had to be repeated; seconds are
from the restart to the first new step, start-up and compilation included.

Checkpointing: the model of `configs/enwik8.py` (20M parameters) in its own precision, at a sequence length that two
cores can train, on a mesh of 2 x 4. Steps with and without a save during them alternate in one process; the cost of a
save is the time that its step takes longer, until the checkpoint is on disk. That cost over 100 steps of the measured
length is the share of a run; the longer the sequence, the smaller. Writes `results.json` and `results.md` beside this
file.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.commands import on_cpu

HERE = Path(__file__).parent
SMALL = {
    "model.layers": 2,
    "model.width": 64,
    "model.positions": "learned",
    "data.seq_len": 128,
    "data.batch_size": 8,
    "eval_every": 0,
    "eval_batches": 1,
    "log_every": 1,
    "checkpoint_every": 10,
    "heartbeat_timeout": 10,
    "optim.steps": 100_000,
    "optim.name": "adamw",
    "optim.learning_rate": 1e-3,
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
}
DEVICES = 2
AFTER = 35  # steps before the fault strikes; by then there are two checkpoints


def command(data: str, workdir: Path) -> list[str]:
    values = SMALL | {"data.source": "text", "data.path": os.path.abspath(data)}
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


def started(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, env=on_cpu(DEVICES), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def steps(process: subprocess.Popen) -> Iterator[int]:
    """The steps that a process logs, as it logs them."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and "train" in line:
            yield int(line.split()[1].split("/")[0])


def newest(workdir: Path) -> Path:
    folders = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return max(folders, key=lambda path: int(path.name))


def kill(process: subprocess.Popen, workdir: Path) -> None:
    process.kill()


def terminate(process: subprocess.Popen, workdir: Path) -> None:
    process.terminate()


def kill_in_a_save(process: subprocess.Popen, workdir: Path) -> None:
    while not list((workdir / "checkpoints").glob("*tmp*")):
        time.sleep(0.0005)
    process.kill()


def kill_and_damage(process: subprocess.Popen, workdir: Path) -> None:
    process.kill()
    process.wait()
    file = max(newest(workdir).glob("params/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FAULTS = {
    "SIGTERM (preemption)": terminate,
    "SIGKILL in a step": kill,
    "SIGKILL in a save": kill_in_a_save,
    "SIGKILL, and a flipped bit in the newest checkpoint": kill_and_damage,
}


def recovery(data: str, workdir: Path, name: str) -> dict:
    """One fault: the steps lost, and the seconds from the restart to the first new step."""
    first = started(command(data, workdir))
    logged = steps(first)
    while next(logged) < AFTER:
        pass
    FAULTS[name](first, workdir)
    done = max([AFTER, *logged])
    first.wait()
    begun = time.perf_counter()
    second = started(command(data, workdir))
    resumed = next(steps(second)) - 1
    seconds = time.perf_counter() - begun
    second.send_signal(signal.SIGKILL)
    second.communicate()
    return {"fault": name, "done": done, "went_on_after": resumed, "lost": done - resumed, "seconds": seconds}


def cost_of_saving(data: str, workdir: Path, rounds: int, length: int) -> dict:
    """Seconds of a step with and without a save during it, alternating."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from configs import enwik8
    from lss_jax.config.schema import from_dict
    from lss_jax.runtime import distributed
    from lss_jax.training.trainer import Trainer

    config = enwik8.get_config()
    changes = {"mesh.data": 2, "mesh.seq": 4, "data.seq_len": length, "data.path": data, "checkpoint_every": 10**9}
    config.update_from_flattened_dict(changes | {"eval_every": 0, "log_every": 1})
    distributed.start()
    trainer = Trainer(from_dict(config), workdir)
    records = trainer.fit()
    next(records), next(records)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for kind, seconds in times.items():
            begun = time.perf_counter()
            if kind == "with":
                trainer.save()
            next(records)
            trainer._checkpoints.wait()  # so that the next step runs without a save
            seconds.append(time.perf_counter() - begun)
    trainer.close()
    without, beside = (statistics.median(seconds) for seconds in times.values())
    return {
        "sequence": length,
        "step_seconds": without,
        "save_seconds": beside - without,
        "share_at_every_100": (beside - without) / (100 * without),
        "megabytes": sum(f.stat().st_size for f in newest(workdir).rglob("*") if f.is_file()) / 1e6,
        "all": times,
    }


def table(faults: list[dict], cost: dict) -> str:
    lines = ["| fault | steps done | resumed after | steps lost | seconds to the first new step |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {f['fault']} | {f['done']} | {f['went_on_after']} | {f['lost']} | {f['seconds']:.1f} |" for f in faults
    ]
    lines += [
        "",
        "| sequence | step, s | a save adds, s | MB | share of a run with a save every 100 steps |",
        "| --- " * 5 + "|",
    ]
    lines += [
        f"| {cost['sequence']} | {cost['step_seconds']:.2f} | {cost['save_seconds']:.2f} | {cost['megabytes']:.0f} "
        f"| {cost['share_at_every_100']:.2%} |"
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="the first 4,000,000 bytes of enwik8")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps, with and without a save")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence where saving is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        faults = [recovery(arguments.data, Path(scratch) / str(i), name) for i, name in enumerate(FAULTS)]
        cost = cost_of_saving(arguments.data, Path(scratch) / "cost", arguments.rounds, arguments.length)
    (HERE / "results.json").write_text(json.dumps({"faults": faults, "saving": cost}, indent=2) + "\n")
    (HERE / "results.md").write_text(table(faults, cost))
    print(table(faults, cost))


if __name__ == "__main__":
    main()
