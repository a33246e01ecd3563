"""Exact attention, each approximation of it, and a hierarchy: what they learn, at equal parameters.

    pip install -r requirements-images.txt
    head -c 4000000 enwik8 > enwik8-first-4MB
    python -m experiments.alternatives.run --enwik8 enwik8-first-4MB --genomes GENOMES

GENOMES is the folder of experiments/genomes. Every model (`models.py`) is trained on every task (`tasks.py`) from three
seeds, twice: with as many tokens as exact attention, and with as many floating-point operations, by the audit's count.
A run that is done is in `results.json` and is not repeated. Writes `results.json`, `results.md` and figures beside this
file. With `--quick` four steps of one seed each, and all files in the folder `--work`.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from experiments.alternatives.costs import costs_of_models
from experiments.alternatives.models import EXACT, keys_of, operations_of, parameters
from experiments.alternatives.report import write_report
from experiments.alternatives.tasks import OPERATIONS, TOKENS, Comparison, comparisons, name_of
from experiments.commands import command, options
from lss_jax import load_config
from lss_jax.runtime import distributed
from lss_jax.storage.metrics import read_records

HERE = Path(__file__).parent
SEEDS = 3
WARMUP = 20
QUICK = 4  # steps


class Run(NamedTuple):
    """A model on a task, with a budget, from a seed."""

    task: Comparison
    model: str
    budget: str
    seed: int
    steps: int
    operations: int  # of a step

    @property
    def key(self) -> str:
        return f"{name_of(self.task, self.model, self.budget)}, seed {self.seed}"


def runs(tasks: list[Comparison], seeds: int, quick: bool) -> list[Run]:
    """All runs, seed by seed."""
    of_first_seed = [run for task in tasks for run in _runs_of(task, quick)]  # counting operations takes its time
    return [run._replace(seed=seed) for seed in range(seeds) for run in of_first_seed]


def _runs_of(task: Comparison, quick: bool) -> Iterator[Run]:
    """The runs of the first seed; at equal operations those whose number of steps differs."""
    steps = QUICK if quick else load_config(task.file, task.keys).optim.steps
    operations = {
        model: operations_of(load_config(task.file, keys_of(model, task.file, task.keys))) for model in task.models
    }
    for model, of_step in operations.items():
        yield Run(task, model, TOKENS, 0, steps, of_step)
        affordable = round(steps * operations[EXACT] / of_step)
        if affordable != steps:
            yield Run(task, model, OPERATIONS, 0, affordable, of_step)


def carry_out(run: Run, work: Path) -> dict[str, Any]:
    """Trains and evaluates; what is to be told of it."""
    task, workdir = run.task, work / run.key.replace(", ", "-").replace(" ", "_")
    schedule = {"optim.steps": run.steps, "optim.warmup_steps": min(WARMUP, run.steps), "eval_every": 0}
    keys = {**keys_of(run.model, task.file, task.keys), **schedule, "seed": run.seed, "mesh.data": 1, "mesh.seq": 1}
    command("train", "--config", task.file, "--workdir", workdir, *options(keys), devices=1)
    config, records = load_config(task.file, keys), read_records(workdir / "metrics.jsonl")
    *_, valid = (record for record in records if record["split"] == "valid")
    found = {
        "value": valid[task.metric],
        "steps": run.steps,
        "parameters": parameters(config),
        "operations": run.steps * run.operations,
        "step_seconds": statistics.median(r["step_seconds"] for r in records if r["split"] == "train"),
    }
    if task.by_position:
        command("evaluate", "--workdir", workdir, "--split", "valid", "--by-position", "--batches", 32, devices=1)
        (windows,) = json.loads((workdir / "by_position_valid.json").read_text())["windows"]
        found["bins"] = [[*one["before"], one[task.metric]] for one in windows["bins"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--enwik8", required=True, metavar="FILE", type=Path, help="the first 4,000,000 bytes of it")
    parser.add_argument("--genomes", required=True, metavar="GENOMES", type=Path, help="the folder of the genomes")
    parser.add_argument("--work", default="runs/alternatives", metavar="DIR", type=Path, help="for runs (%(default)s)")
    parser.add_argument("--jobs", default=2, metavar="N", type=int, help="runs at a time (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each kind, to see that all works")
    arguments = parser.parse_args()
    distributed.start()
    out = arguments.work if arguments.quick else HERE
    tasks = comparisons(arguments.enwik8, arguments.genomes, arguments.work / "data")
    results, lock = out / "results.json", threading.Lock()
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"costs": {}, "runs": {}}
    every = runs(tasks, 1 if arguments.quick else SEEDS, arguments.quick)
    missing = [run for run in every if run.key not in found["runs"]]

    def one(run: Run) -> None:
        started = time.perf_counter()
        result = carry_out(run, arguments.work)
        with lock:
            found["runs"][run.key] = result
            results.write_text(json.dumps(found, indent=1) + "\n")
            print(f"=== {len(found['runs'])} of {len(every)}: {run.key}: {result['value']:.4f}", flush=True)
            print(f"=== in {time.perf_counter() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, missing))
    if not found["costs"]:
        found["costs"] = costs_of_models()
        results.write_text(json.dumps(found, indent=1) + "\n")
    write_report(found, tasks, out)


if __name__ == "__main__":
    main()
