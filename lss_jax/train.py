"""Train a model: `python -m lss_jax.train --config configs/default.py`."""

import argparse
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import jax

from lss_jax import cli
from lss_jax.config.schema import RunError
from lss_jax.models import parameter_count
from lss_jax.parallel.layout import layout_on
from lss_jax.reports import summary
from lss_jax.runtime import distributed
from lss_jax.runtime.peers import Alone, Peers
from lss_jax.runtime.signals import stopping_on_signals
from lss_jax.storage.metrics import console_line, read_records
from lss_jax.tasks.task import shown
from lss_jax.training.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.train",
        description="Train a model on this machine's devices (8 simulated CPU devices if there is no accelerator).",
        epilog=f"{cli.OVERRIDES} configs/base.py lists all keys. Ctrl-C saves and stops; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/default.py")
    parser.add_argument("--workdir", metavar="DIR", help="the folder of the run (default: runs/NAME of the config)")
    cli.add_launch(parser)
    arguments, config = cli.parse(parser, cli.config_of_file)
    with cli.start(arguments, config) as peers:
        trainer = Trainer(config, Path(arguments.workdir or Path("runs") / Path(arguments.config).stem))
        with stopping_on_signals(peers):
            text = train(trainer, peers)
        if not distributed.is_first():
            return 128 + peers.signal if peers.signal else 0
        if peers.signal:
            print(f"stopped after step {trainer.step}, which is saved; the same command goes on from there")
            return 128 + peers.signal
        print(text)
        return 0


def train(trainer: Trainer, peers: Alone | Peers) -> str:
    """Trains to the end, or until a signal asks it to stop, and saves; returns a summary for the console."""
    prints, steps = distributed.is_first(), trainer.config.optim.steps
    if prints:
        introduce(trainer)
    trained = trainer.step < steps
    if trained:
        if prints:
            print("compiling the training step ...", flush=True)
        seconds = trainer.compile()
        if prints:
            print(f"compiled in {seconds:.1f} s", flush=True)
        try:
            for record in trainer.fit(peers.may_start):
                if prints:
                    print(console_line(record, steps, shown(trainer.task, record)), flush=True)
            trainer.save()
        except RunError:
            with suppress(RunError):  # earlier saves are sound
                trainer.close()
            raise
    trainer.close()
    learned = summary.lines_of(trainer) if trained and trainer.step >= steps else []  # on all processes' devices
    return summary_of(trainer, learned) if prints else ""


def introduce(trainer: Trainer) -> None:
    """Prints what is about to run."""
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
    for line in trainer.task.introduction(trainer.splits["train"]):
        print(line)
    print(f"workdir  {trainer.workdir}" + (f", going on after step {trainer.step}" if trainer.step else ""), flush=True)
    for key, (then, now) in trainer.changes.items():
        print(f"changed  {key} from {then!r} to {now!r}", flush=True)


def summary_of(trainer: Trainer, learned: list[str]) -> str:
    """The last losses and the speed, what was `learned`, the files of the run, and the commands to try next."""
    config, workdir = trainer.config, trainer.workdir
    last = {record["split"]: record for record in read_records(workdir / "metrics.jsonl")}
    lines = ["", f"done after {trainer.step} of {config.optim.steps} steps"]
    nats, metric = trainer.task.metrics[0], trainer.task.headline
    for split, note in (("train", "last step"), ("valid", f"first {config.eval_batches} batches")):
        if split in last:
            record = last[split]
            lines.append(
                f"  {split}  {record[metric.name]:.4f} {metric.unit}, {record[nats.name]:.4f} {nats.unit}  ({note})"
            )
    if "train" in last:
        lines.append(f"  speed  {last['train']['tokens_per_second']:,.0f} tokens/s")
    profile = ", profile/" if (workdir / "profile").is_dir() else ""
    prompt = config.sample_prompt
    again, folder = shlex.join(["python", "-m", "lss_jax.train", *sys.argv[1:]]), shlex.quote(str(workdir))
    lines += [
        *learned,
        f"  files  {workdir}/: checkpoints/, metrics.jsonl, tensorboard/, config.json{profile}",
        "next:",
        *[f"  python -m lss_jax.generate --workdir {folder} --prompt {shlex.quote(prompt)}"] * bool(prompt),
        f"  python -m lss_jax.evaluate --workdir {folder} --split test --by-position",
        f"  {again} --config.optim.steps={2 * trainer.step}   # train on",
        f"  pip install tensorboard && tensorboard --logdir {folder}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
