"""Train a model: `python -m lss_jax.train --config configs/default.py`."""

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from lss_jax import cli
from lss_jax.config.schema import RunError, from_dict
from lss_jax.models import parameter_count
from lss_jax.parallel.layout import layout_on
from lss_jax.runtime import distributed
from lss_jax.runtime.peers import Alone, Peers
from lss_jax.storage.metrics import console_line, read_records
from lss_jax.tasks.task import shown
from lss_jax.training.trainer import Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is for Slurm: sbatch --signal=USR1@120


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.train",
        description="Train a model on this machine's devices (8 simulated CPU devices if there is no accelerator).",
        epilog=f"{cli.OVERRIDES} configs/base.py lists all keys. Ctrl-C saves and stops; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/default.py")
    parser.add_argument("--workdir", metavar="DIR", help="where the run is kept (default: runs/NAME of the config)")
    cli.add_launch(parser)
    arguments, values = cli.parse(parser, lambda arguments: cli.load_config_file(arguments.config))
    config = from_dict(values)
    with cli.start(arguments, config) as peers:
        trainer = Trainer(config, Path(arguments.workdir or Path("runs") / Path(arguments.config).stem))
        with stopping_on_signals(peers):
            summary = train(trainer, peers)
        if not distributed.is_first():
            return 128 + peers.signal if peers.signal else 0
        if peers.signal:
            print(f"stopped after step {trainer.step}, which is saved; the same command goes on from there")
            return 128 + peers.signal
        print(summary)
        return 0


def train(trainer: Trainer, peers: Alone | Peers) -> str:
    """Trains to the end, or until it is asked to stop, saves, and returns what there is to say."""
    talks, steps = distributed.is_first(), trainer.config.optim.steps
    if talks:
        introduce(trainer)
    if trainer.step < steps:
        if talks:
            print("compiling the training step ...", flush=True)
        seconds = trainer.compile()
        if talks:
            print(f"compiled in {seconds:.1f} s", flush=True)
        try:
            for record in trainer.fit(peers.may_start):
                if talks:
                    print(console_line(record, steps, shown(trainer.task, record)), flush=True)
            trainer.save()
        except RunError:
            with suppress(RunError):  # what was being saved before is sound
                trainer.close()
            raise
    trainer.close()
    return summarize(trainer) if talks else ""


@contextmanager
def stopping_on_signals(peers: Alone | Peers) -> Iterator[None]:
    """Ctrl-C, SIGTERM or SIGUSR1 end the training after the step in hand; a second Ctrl-C ends the process at once.

    A thread sees to it, woken by the interpreter's own handler: the main thread may be in a long step.
    """
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    watch = threading.Thread(target=_watch_signals, args=(wakes, peers), daemon=True)
    watch.start()
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    old = signal.set_wakeup_fd(woken)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(woken)
        watch.join()
        os.close(wakes)


def _watch_signals(wakes: int, peers: Alone | Peers) -> None:
    stopping = False
    while received := os.read(wakes, 1):
        number = received[0]
        if stopping and number == signal.SIGINT:
            os._exit(128 + number)
        if not stopping and number in SIGNALS:
            stopping = True
            os.write(1, b"\nfinishing the step and saving; Ctrl-C (again) to quit at once\n")
            peers.request_stop(number)


def introduce(trainer: Trainer) -> None:
    """Says what is about to run."""
    config, devices = trainer.config, trainer.mesh.devices.flat
    sizes = " x ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items())
    layout, attention = layout_on(config, trainer.mesh), config.attention
    part = layout.padded(config.data.seq_len) // layout.devices // layout.parts
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"devices  {trainer.mesh.size} {devices[0].device_kind}{processes}, mesh {sizes}")
    print(
        f"model    {config.model.family}, {parameter_count(trainer.model):,} parameters, {config.model.dtype}, "
        f"attention {attention.strategy} ({attention.layout}, {trainer.kernel})"
    )
    print(
        f"data     {config.data.source}, {len(trainer.splits['train'].data):,} {trainer.task.items} to train on; "
        f"a step is {config.data.batch_size} sequences of {config.data.seq_len:,} tokens, {part:,} per device"
    )
    if config.data.separator:
        documents = trainer.splits["train"].documents
        print(f"packed   {documents:,} documents in the training data, each ending with {config.data.separator!r}")
    print(f"workdir  {trainer.workdir}" + (f", going on after step {trainer.step}" if trainer.step else ""), flush=True)
    for key, (then, now) in trainer.changes.items():
        print(f"changed  {key} from {then!r} to {now!r}", flush=True)


def summarize(trainer: Trainer) -> str:
    """What came out, where it is, and what to try next."""
    config, workdir, step = trainer.config, trainer.workdir, trainer.step
    last = {record["split"]: record for record in read_records(workdir / "metrics.jsonl")}
    batches = f"first {config.eval_batches} batches"
    again = shlex.join(["python", "-m", "lss_jax.train", *sys.argv[1:]])
    more = f"{again} --config.optim.steps={2 * step}"
    lines = ["", f"done after {step} of {config.optim.steps} steps"]
    nats, metric = trainer.task.metrics[0], trainer.task.headline
    for split, note in (("train", "last step"), ("valid", batches)):
        if split in last:
            record = last[split]
            lines.append(
                f"  {split}  {record[metric.name]:.4f} {metric.unit}, {record[nats.name]:.4f} {nats.unit}  ({note})"
            )
    if "train" in last:
        lines.append(f"  speed  {last['train']['tokens_per_second']:,.0f} tokens/s")
    profile = ", profile/" if (workdir / "profile").is_dir() else ""
    lines.append(f"  files  {workdir}/: checkpoints/, metrics.jsonl, tensorboard/, config.json{profile}")
    lines.append("next:")
    lines.append(f"  python -m lss_jax.evaluate --workdir {shlex.quote(str(workdir))} --split test")
    lines.append(f"  {more}   # train on")
    lines.append(f"  pip install tensorboard && tensorboard --logdir {shlex.quote(str(workdir))}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
