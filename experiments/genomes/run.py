"""Models of the next base and of coding bases, on genomes that they have not seen, for contexts of 512 to 16,384 bases.

    python -m experiments.genomes.baselines --data GENOMES
    python -m experiments.genomes.run --data GENOMES

GENOMES is a folder with the files that the README of this folder names. Trains `configs/genome.py` for each context and
`configs/genes.py`, with three seeds each, and evaluates them. A run that is done is in `results.json` and is not
repeated; one that was interrupted goes on from its last checkpoint in the folder `--work`. Writes `results.json`,
`results.md` and `by_position.png` beside this file. With `--quick`, which takes some minutes, a few steps of each kind,
and all files in the folder `--work`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.commands import command, options
from experiments.genomes.genomes import CONTIGS, EVALUATED, HELD_OUT, TRAIN, file_of
from experiments.genomes.report import write_report
from lss_jax.storage.metrics import read_records

HERE = Path(__file__).parent
DEVICES = 2
TOKENS = 2**14  # of a step, whatever the context


class Size(NamedTuple):
    """How much is trained and evaluated."""

    contexts: tuple[int, ...]
    seeds: int
    steps: int
    genes_steps: int
    evaluated: int  # bases of each held-out genome


FULL = Size((512, 4096, 16384), seeds=3, steps=120, genes_steps=600, evaluated=EVALUATED)
QUICK = Size((512, 1024), seeds=1, steps=4, genes_steps=4, evaluated=2 * TOKENS)


def train(config: str, workdir: Path, seed: int, steps: int, values: dict[str, Any]) -> float:
    """The seconds of all training steps of a run; one that was interrupted goes on."""
    schedule = {"optim.steps": steps, "optim.warmup_steps": min(20, steps), "log_every": 1, "checkpoint_every": 50}
    chosen = options({"seed": seed, "eval_every": 0, "sample_prompt": "", **schedule, **values})
    command("train", "--config", config, "--workdir", workdir, *chosen, devices=DEVICES)
    records = read_records(workdir / "metrics.jsonl")
    return sum(record["step_seconds"] for record in records if record["split"] == "train")


def next_bases(folder: Path, workdir: Path, size: Size, context: int, seed: int) -> dict[str, Any]:
    """Bits per base by position, on each held-out genome."""
    held_out = list(HELD_OUT)
    values = {
        "data.path": ",".join(str(file_of(folder, name)) for name in TRAIN),
        "data.valid_path": file_of(folder, held_out[0]),
        "data.test_path": file_of(folder, held_out[1]),
        "data.seq_len": context,
        "data.batch_size": TOKENS // context,
    }
    seconds, found = train("configs/genome.py", workdir, seed, size.steps, values), {}
    for name in held_out:
        test = options({"data.test_path": file_of(folder, name)} if name != held_out[0] else {})
        split = "valid" if name == held_out[0] else "test"
        batches = size.evaluated // TOKENS
        shown = ["--split", split, "--by-position", "--batches", batches]
        command("evaluate", "--workdir", workdir, *shown, *test, devices=DEVICES)
        (found[name],) = json.loads((workdir / f"by_position_{split}.json").read_text())["windows"]
    return {"steps": size.steps, "seconds": seconds, "genomes": found}


def coding_bases(folder: Path, workdir: Path, size: Size, seed: int) -> dict[str, Any]:
    """The metrics on the held-out contigs."""
    values = {"data.path": folder / CONTIGS, "data.valid_path": "", "data.test_path": "", "data.annotation": ""}
    seconds = train("configs/genes.py", workdir, seed, size.genes_steps, values)
    command("evaluate", "--workdir", workdir, "--split", "test", devices=DEVICES)
    *_, record = (r for r in read_records(workdir / "metrics.jsonl") if r["split"] == "test")
    return {"steps": size.genes_steps, "seconds": seconds, "test": record}


def runs(folder: Path, work: Path, size: Size) -> Iterator[tuple[str, Any]]:
    """Every run by its name: what carries it out."""
    for seed in range(size.seeds):
        name = f"genes, seed {seed}"
        yield name, lambda name=name, seed=seed: coding_bases(folder, work / name, size, seed)
        for context in size.contexts:
            name = f"bases, context {context}, seed {seed}"
            yield name, lambda name=name, c=context, seed=seed: next_bases(folder, work / name, size, c, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="GENOMES", type=Path, help="the folder of the genomes")
    parser.add_argument("--work", default="runs/genomes", metavar="DIR", type=Path, help="for runs (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each kind, to see that all works")
    arguments = parser.parse_args()
    size, out = (QUICK, arguments.work) if arguments.quick else (FULL, HERE)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    missing = [(name, carry_out) for name, carry_out in runs(arguments.data, arguments.work, size) if name not in found]
    for number, (name, carry_out) in enumerate(missing, start=1):
        print(f"=== run {number} of {len(missing)} that are missing: {name}", flush=True)
        started = time.perf_counter()
        found[name] = carry_out()
        results.write_text(json.dumps(found, indent=2) + "\n")
        print(f"=== done in {time.perf_counter() - started:.0f} s", flush=True)
    write_report(found, json.loads((HERE / "baselines.json").read_text()), out)


if __name__ == "__main__":
    main()
