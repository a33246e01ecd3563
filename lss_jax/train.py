"""Train a model: `python -m lss_jax.train --config configs/default.py`."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lss_jax import cli, distributed
from lss_jax.attention.setting import layout_on
from lss_jax.config import from_dict
from lss_jax.metrics import console_line, read_records
from lss_jax.models import parameter_count
from lss_jax.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.train",
        description="Train a model on this machine's devices (8 simulated CPU devices if there is no accelerator).",
        epilog=f"{cli.OVERRIDES} configs/base.py lists all keys. Ctrl-C saves and stops; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/default.py")
    parser.add_argument("--workdir", metavar="DIR", help="where the run is kept (default: runs/NAME of the config)")
    arguments, values = cli.parse(parser, lambda arguments: cli.load_config_file(arguments.config))
    config = from_dict(values)
    distributed.start()
    trainer = Trainer(config, Path(arguments.workdir or Path("runs") / Path(arguments.config).stem))
    with stopping_on_signals(trainer) as received:
        introduce(trainer)
        if trainer.step < config.optim.steps:
            print("compiling the training step ...", flush=True)
            print(f"compiled in {trainer.compile():.1f} s", flush=True)
            for record in trainer.fit():
                print(console_line(record, config.optim.steps), flush=True)
            trainer.save()
        summary = summarize(trainer)
        trainer.close()
    if received:
        print(f"stopped after step {trainer.step}, which is saved; the same command goes on from there")
        return 128 + received[0]
    print(summary)
    return 0


@contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM ends the training after the step in hand, the next one ends the process at once."""
    received: list[int] = []

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        trainer.stopping = True
        restore()
        os.write(1, b"\nfinishing the step and saving; once more to quit at once\n")  # print is not for handlers

    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        restore()


def introduce(trainer: Trainer) -> None:
    """Says what is about to run."""
    config, devices = trainer.config, trainer.mesh.devices.flat
    sizes = " x ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items())
    layout, attention = layout_on(config, trainer.mesh), config.attention
    part = layout.padded(config.data.seq_len) // layout.devices // layout.parts
    print(f"devices  {trainer.mesh.size} {devices[0].device_kind}, mesh {sizes}")
    print(
        f"model    {config.model.family}, {parameter_count(trainer.model):,} parameters, {config.model.dtype}, "
        f"attention {attention.strategy} ({attention.layout}, {trainer.kernel})"
    )
    print(
        f"data     {config.data.source}, {len(trainer.splits['train'].data):,} bytes to train on; a step is "
        f"{config.data.batch_size} sequences of {config.data.seq_len:,} tokens, {part:,} per device"
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
    for split, note in (("train", "last step"), ("valid", batches)):
        if split in last:
            record = last[split]
            lines.append(f"  {split}  {record['bits_per_byte']:.4f} bits/byte, {record['loss']:.4f} nats  ({note})")
    if "train" in last:
        lines.append(f"  speed  {last['train']['tokens_per_second']:,.0f} tokens/s")
    lines.append(f"  files  {workdir}/: checkpoints/, metrics.jsonl, tensorboard/, config.json")
    lines.append("next:")
    lines.append(f"  python -m lss_jax.evaluate --workdir {shlex.quote(str(workdir))} --split test")
    lines.append(f"  {more}   # train on")
    lines.append(f"  pip install tensorboard && tensorboard --logdir {shlex.quote(str(workdir))}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
