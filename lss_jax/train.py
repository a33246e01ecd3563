"""Train a model: `python -m lss_jax.train --config configs/default.py`."""

import argparse
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from ml_collections import ConfigDict

from lss_jax import cli
from lss_jax.config.schema import ConfigError, RunError
from lss_jax.reports import summary
from lss_jax.runtime import distributed
from lss_jax.runtime.peers import Alone, Peers
from lss_jax.runtime.signals import stopping_on_signals
from lss_jax.storage.metrics import console_line
from lss_jax.tasks.task import shown
from lss_jax.training.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.train",
        description="Train a model on this machine's devices (8 simulated CPU devices if there is no accelerator).",
        epilog=f"{cli.OVERRIDES} configs/base.py lists all keys. Ctrl-C saves and stops; the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="for example configs/default.py (default: that of the run)")
    parser.add_argument("--workdir", metavar="DIR", help="the folder of the run (default: runs/NAME of the config)")
    cli.add_launch(parser)
    arguments, config = cli.parse(parser, _config)
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


def _config(arguments: argparse.Namespace) -> ConfigDict:
    if arguments.config:
        return cli.config_of_file(arguments)
    if arguments.workdir:
        return cli.config_of_run(arguments)
    raise ConfigError("give --config=FILE, for example configs/default.py, or the --workdir=DIR of a run to go on with")


def train(trainer: Trainer, peers: Alone | Peers) -> str:
    """Trains to the end, or until a signal asks it to stop, and saves; returns a summary for the console."""
    steps = trainer.config.optim.steps
    say(summary.introduction(trainer))
    if trainer.step < steps:
        say("compiling the training step ...")
        say(f"compiled in {trainer.compile():.1f} s")
        fit(trainer, peers)
    trainer.close()
    learned = []
    if trainer.step >= steps and peers.may_start(steps + 1):  # not when asked to stop: all processes agree
        if trainer.task.by_position:
            say("evaluating by position ...")
        learned = summary.learned(trainer)
    again = shlex.join(["python", "-m", "lss_jax.train", *sys.argv[1:]])
    return summary.conclusion(trainer, learned, again) if distributed.is_first() else ""


def fit(trainer: Trainer, peers: Alone | Peers) -> None:
    """Trains, with a line on the console for every record, and saves."""
    try:
        for record in trainer.fit(peers.may_start):
            say(console_line(record, trainer.config.optim.steps, shown(trainer.task, record)))
        trainer.save()
    except RunError:
        with suppress(RunError):  # earlier saves are sound
            trainer.close()
        raise


def say(text: str) -> None:
    """Prints a text, in process 0 alone."""
    if distributed.is_first():
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(main)
