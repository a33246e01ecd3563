"""What is the context worth? Dice with the whole image in view, with a quarter and a sixteenth of it, and with patches.

    pip install -r requirements-images.txt
    python -m experiments.segmentation.run            # goes on where it stopped
    python -m experiments.segmentation.run --quick    # one seed, few steps; prints a table
    python -m experiments.segmentation.run --full     # slices of 45,901 pixels; for accelerators

Trains `configs/mri.py` and `configs/mosaics.py` with each of these views, from three seeds, all for the same number of
steps on the same number of pixels per step, and evaluates on the whole test split. A window is a number of whole rows,
which is a quarter or a sixteenth rounded up. Beside them stands what grey levels alone tell: each pixel gets the class
that is most frequent for its grey level in the training split.

Adds each finished run to `results.json`, and writes `results.md` and the pictures of the first seed beside this file.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.commands import options
from lss_jax.config.loading import load_config_file
from lss_jax.config.schema import Config, from_dict
from lss_jax.data.image_sources import IMAGES
from lss_jax.data.images import Grid
from lss_jax.models import build_model, parameter_count
from lss_jax.storage.metrics import read_records
from lss_jax.storage.workdir import load_config

HERE = Path(__file__).parent
SOURCES = ("mri", "mosaics")
SEEDS = (0, 1, 2)
VIEWS = {  # the pixels on the side of a token, and into how many windows an image is divided
    "whole image": (1, 1),
    "a quarter": (1, 4),
    "a sixteenth": (1, 16),
    "patches of 2 x 2": (2, 1),
    "patches of 4 x 4": (4, 1),
}
STEPS = {"mri": 300, "mosaics": 600}
PICTURED = ("whole image", "a sixteenth", "patches of 4 x 4")
QUICK = {"optim.steps": 4, "optim.warmup_steps": 1}
FULL = {"data.downsample": 1, "model.dtype": "bfloat16", "model.remat": "block"}


class Run(NamedTuple):
    """A run: its data, what the model sees at once, and its seed."""

    source: str
    view: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.source}, {self.view}, seed {self.seed}"

    @property
    def folder(self) -> str:
        return self.key.replace(", ", "-").replace(" ", "_")


def config_of(source: str, changes: dict[str, Any]) -> Config:
    values = load_config_file(f"configs/{source}.py")
    values.update_from_flattened_dict(changes)
    return from_dict(values)


def views(config: Config, height: int, width: int) -> dict[str, dict[str, Any]]:
    """The config keys of each view of images of this size; a batch has the pixels of as many images in each."""
    found = {}
    for name, (patch, parts) in VIEWS.items():
        grid = Grid(height, width, patch, 1)
        rows = -(-grid.rows // parts)
        found[name] = {
            "data.patch": patch,
            "data.seq_len": rows * grid.columns,
            "data.batch_size": config.data.batch_size * -(-grid.rows // rows),
            "model.rope_columns": grid.columns,
        }
    return found


class Training:
    """Runs the project's commands on a run's config; `scratch` holds the workdirs."""

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self._environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **os.environ}

    def __call__(self, run: Run, changes: dict[str, Any]) -> dict[str, Any]:
        """Trains and evaluates; what is to be told of it."""
        workdir, keys = self._scratch / run.folder, options({**changes, "seed": run.seed})
        train = ["train", "--config", f"configs/{run.source}.py", "--workdir", str(workdir), *keys]
        self._command(*train)
        self._command("evaluate", "--workdir", str(workdir), "--split", "test")
        records = read_records(workdir / "metrics.jsonl")
        (test,) = (record for record in records if record["split"] == "test")
        trained = [record["step_seconds"] for record in records if record["split"] == "train"]
        return {
            "command": "python -m lss_jax.train " + " ".join(train[1:3] + keys),
            "parameters": parameter_count(build_model(load_config(workdir))),
            "steps": test["step"],
            "step_seconds": statistics.median(trained),
            "test": {key: test[key] for key in test if key in ("loss", "accuracy") or key.startswith("dice")},
        }

    def pictures(self, run: Run, out: Path) -> None:
        """Draws some test images with a finished run's predictions."""
        workdir = self._scratch / run.folder
        self._command("evaluate", "--workdir", str(workdir), "--split", "test", "--pictures", "3")
        shutil.copy(workdir / "pictures_test.png", out)

    def _command(self, module: str, *arguments: str) -> None:
        words = [sys.executable, "-m", f"lss_jax.{module}", *arguments]
        subprocess.run(words, env=self._environment, check=True, stdout=subprocess.DEVNULL)


def by_grey_level(source: str, config: Config) -> dict[str, float]:
    """Accuracy and Dice on the test split of the most frequent class of each grey level."""
    images = IMAGES[source](config.data)
    counts = np.zeros((256, len(images.names)))
    np.add.at(counts, (images.pixels["train"].ravel(), images.labels["train"].ravel()), 1)
    predicted, labels = np.argmax(counts, axis=1)[images.pixels["test"]], images.labels["test"]
    dice = {}
    for number, name in enumerate(images.names):
        both = np.sum((predicted == number) & (labels == number))
        dice[f"dice_{name}"] = float(2 * both / (np.sum(predicted == number) + np.sum(labels == number)))
    accuracy = float(np.mean(predicted == labels))
    return {"accuracy": accuracy, "dice": statistics.mean(dice.values()), **dice}


def rows_of(source: str, results: dict[str, Any]) -> list[str]:
    """The table of one source: a row per view, the mean over seeds and the range of the mean Dice."""
    alone = results["grey levels alone"][source]
    classes = [key.removeprefix("dice_") for key in alone if key.startswith("dice_")]
    lines = [
        f"| in view | parameters | steps | seconds per step | mean Dice (lowest to highest) | {' | '.join(classes)} |",
        "| " + " | ".join(["---"] * (5 + len(classes))) + " |",
        f"| grey levels alone | - | - | - | {alone['dice']:.4f} | {_dices([alone], classes)} |",
    ]
    for view in VIEWS:
        runs = [results["runs"][key] for key in results["runs"] if key.startswith(f"{source}, {view}, ")]
        if runs:
            tests = [run["test"] for run in runs]
            dices = [test["dice"] for test in tests]
            spread = f"{statistics.mean(dices):.4f} ({min(dices):.4f} to {max(dices):.4f}, {len(dices)} seeds)"
            seconds = statistics.median(run["step_seconds"] for run in runs)
            numbers = f"{runs[0]['parameters']:,} | {runs[0]['steps']:,} | {seconds:.2f}"
            lines.append(f"| {view} | {numbers} | {spread} | {_dices(tests, classes)} |")
    return lines


def _dices(tests: list[dict[str, float]], classes: list[str]) -> str:
    return " | ".join(f"{statistics.mean(test[f'dice_{name}'] for test in tests):.3f}" for name in classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed and few steps, and nothing is written")
    size.add_argument("--full", action="store_true", help="at full resolution")
    arguments = parser.parse_args()
    name = "full" if arguments.full else "results"
    changes = QUICK if arguments.quick else FULL if arguments.full else {}
    path = HERE / f"{name}.json"
    results: dict[str, Any] = {"grey levels alone": {}, "runs": {}}
    if path.exists() and not arguments.quick:
        results = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        train = Training(Path(scratch))
        for seed in SEEDS[:1] if arguments.quick else SEEDS:
            for source in SOURCES:
                measure(source, seed, train, results, changes, None if arguments.quick else path)
    lines = [line for source in SOURCES for line in (f"**{source}**", "", *rows_of(source, results), "")]
    if not arguments.quick:
        (HERE / f"{name}.md").write_text("\n".join(lines))
    print("\n".join(lines))


def measure(
    source: str, seed: int, train: Training, results: dict[str, Any], changes: dict[str, Any], path: Path | None
) -> None:
    """Adds the runs of one source and seed that the results do not have yet; each is saved when it is finished."""
    config = config_of(source, changes)
    images = IMAGES[source](config.data)
    if source not in results["grey levels alone"]:
        results["grey levels alone"][source] = by_grey_level(source, config)
    for view, keys in views(config, *images.pixels["test"].shape[1:]).items():
        run = Run(source, view, seed)
        if run.key in results["runs"]:
            continue
        results["runs"][run.key] = found = train(run, {"optim.steps": STEPS[source], **changes, **keys})
        print(f"{run.key}: mean Dice {found['test']['dice']:.4f}, {found['step_seconds']:.2f} s per step", flush=True)
        if path is not None:
            if seed == SEEDS[0] and view in PICTURED:
                train.pictures(run, path.with_name(f"{path.stem}_{source}_{view.replace(' ', '_')}.png"))
            path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
