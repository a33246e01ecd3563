"""Copies 2,048 symbols, and reverses them, with the encoder-decoder on eight devices: the stages that it takes.

    python -m experiments.copying.run

Trains `configs/copy.py` in stages, each of which starts from the parameters of the one before, and evaluates each on
1,024 documents of the test split. A stage that is done is in `results.json` and is not repeated; one that was
interrupted goes on from its checkpoint in the folder `--work`. Writes `results.json` and `results.md` beside this file.
With `--quick` a few steps of each stage, and all files in the folder `--work`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from experiments.commands import command, options
from experiments.tables import table
from lss_jax.storage.metrics import read_records

HERE = Path(__file__).parent
DEVICES = 8
LONG = {"data.seq_len": 2048, "data.source_len": 2048}
ONE_LAYER = {"model.layers": 1, "eval_every": 0, "log_every": 10}
COPY = {**ONE_LAYER, "data.source": "copy"}
REVERSE = {
    **ONE_LAYER,
    "data.source": "reverse",
    "model.positions": "sinusoidal",
    "model.width": 128,
    "model.heads": 1,
    "model.tied_head": False,
    "optim.name": "muon",
    "optim.beta1": 0.95,
    "optim.beta2": 0.99,
    "optim.warmup_steps": 10,
    "optim.weight_decay": 0.0,
}
ALIGN = {  # trains the norms of the decoder, and which source token a target token attends to
    **REVERSE,
    **LONG,
    "data.batch_size": 4,
    "optim.frozen": "tokens/*,head/*,*/value/*,*/out/kernel,*/mlp/*,*encoder*,stack/blocks/attention/*",
}
STAGES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "copy": [
        ("64 symbols", {**COPY, "optim.steps": 150}),
        ("2,048 symbols", {**COPY, **LONG, "data.batch_size": 2, "optim.learning_rate": 1e-3, "optim.steps": 60}),
    ],
    "reverse": [
        (
            "which symbols there are, out of 8",
            {
                **REVERSE,
                "data.seq_len": 8,
                "data.source_len": 8,
                "data.batch_size": 64,
                "optim.learning_rate": 1e-2,
                "optim.steps": 150,
                "optim.frozen": "tokens/*,*/query/*,*/key/*,*/mlp/*,*/attention/*",
            },
        ),
        ("where, of 2,048", {**ALIGN, "optim.learning_rate": 2e-2, "optim.steps": 100}),
        ("where, of 2,048, on", {**ALIGN, "optim.learning_rate": 3e-2, "optim.steps": 100}),
        (
            "all but tokens and self-attention",
            {
                **REVERSE,
                **LONG,
                "data.batch_size": 4,
                "optim.learning_rate": 1.5e-2,
                "optim.steps": 120,
                "optim.frozen": "tokens/*,*/attention/*",
            },
        ),
    ],
}


def carry_out(workdir: Path, keys: dict[str, Any], before: Path | None) -> dict[str, Any]:
    """Trains a stage, and the share of exact tokens of the test split, given the right tokens before them."""
    started = time.perf_counter()
    start = {} if before is None or (workdir / "metrics.jsonl").exists() else {"start_from": before}
    command("train", "--config=configs/copy.py", "--workdir", workdir, *options({**keys, **start}), devices=DEVICES)
    seconds = time.perf_counter() - started
    command("evaluate", "--workdir", workdir, "--split", "test", devices=DEVICES)
    *_, test = (record for record in read_records(workdir / "metrics.jsonl") if record["split"] == "test")
    return {"steps": keys["optim.steps"], "seconds": seconds, "exact": test["exact"], "loss": test["loss"]}


def table_of(found: dict[str, Any]) -> list[str]:
    """The table: a row per stage."""
    rows = []
    for task, stages in STAGES.items():
        for name, keys in stages:
            if f"{task}, {name}" in found:
                result, length = found[f"{task}, {name}"], keys.get("data.seq_len", 64)
                measured = (f"{result['exact']:.4f}", f"{result['seconds']:.0f}")
                rows.append([task, name, str(result["steps"]), f"{length:,}", *measured])
    return table(["task", "stage", "steps", "length", "exact, test split", "seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/copying", metavar="DIR", type=Path, help="for runs (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage, to see that all works")
    arguments = parser.parse_args()
    out = arguments.work if arguments.quick else HERE
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for task, stages in STAGES.items():
        before = None
        for number, (name, keys) in enumerate(stages):
            workdir, key = arguments.work / f"{task}-{number}", f"{task}, {name}"
            if key not in found:
                quick = {"optim.steps": 4, "optim.warmup_steps": 2} if arguments.quick else {}
                found[key] = carry_out(workdir, {**keys, **quick}, before)
                results.write_text(json.dumps(found, indent=2) + "\n")
            before = workdir
    (out / "results.md").write_text("\n".join([*table_of(found), ""]))
    print("\n".join(table_of(found)))


if __name__ == "__main__":
    main()
