"""ROUGE of a small encoder-decoder from scratch, beside what is there without one: the first sentences of a paper.

    pip install -r requirements-dev.txt
    python -m experiments.summaries.run

Trains `configs/summaries.py` on the 100 papers of the training split of ACLSum (package `aclsum`), for each of the
three aspects that its summaries have and for three seeds, and scores the texts of a search with four beams on the 100
papers of the test split. Beside them: the first sentence and the first three of each abstract, and one and the same
text for all papers, that summary of the training split that is on average nearest to the others.

An interrupted experiment goes on with the same command, from the checkpoints and texts in `--workdir`. `--quick` is a
trial of one aspect, one seed, few steps and few papers, and writes nothing. Writes `results.json` and `results.md`
beside this file.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from configs import summaries
from experiments.commands import command, options
from lss_jax.config.schema import Config, from_dict
from lss_jax.data.text import decoded
from lss_jax.parallel.mesh import make_mesh
from lss_jax.reports.rouge import MEASURES, Rouge
from lss_jax.reports.summaries import documents_of
from lss_jax.runtime import distributed
from lss_jax.tasks import make_task

ASPECTS, SEEDS, BEAMS = ("challenge", "approach", "outcome"), (0, 1, 2), 4
DEVICES = 2  # as many as cores; any other mesh gives the same texts
SHOWN = 5  # texts of each run that are kept
QUICK = {"optim.steps": 20}
HERE = Path(__file__).parent


def run(workdir: Path, aspect: str, seed: int, overrides: dict[str, Any], batches: int | None) -> dict[str, Any]:
    """Trains, or goes on, and scores the texts: ROUGE by kind of text."""
    folder = workdir / f"{aspect}_{seed}"
    keys = {"data.answer_field": aspect, "seed": seed, "mesh.data": 1, "mesh.seq": DEVICES, **overrides}
    command("train", "--config=configs/summaries.py", f"--workdir={folder}", *options(keys), devices=DEVICES)
    some = [] if batches is None else [f"--batches={batches}"]
    shown = ["--rouge", "--split=test", f"--beams={BEAMS}", *some]
    command("evaluate", f"--workdir={folder}", *shown, devices=DEVICES)
    result = json.loads((folder / "rouge_test.json").read_text())
    return {key: result[key] for key in ("step", "documents", "scores")} | {"texts": result["texts"][:SHOWN]}


def typical(aspect: str, count: int) -> tuple[str, dict[str, float]]:
    """The most typical summary of the training split, and its scores as that of each of the first test papers."""
    config, rouge = config_of(aspect), Rouge()
    training, test = references(config, "train"), references(config, "test")[:count]
    means = [rouge.of([other for other in training if other != one], [one] * (len(training) - 1)) for one in training]
    text = training[max(range(len(training)), key=lambda number: means[number]["rougeL"])]
    return text, rouge.of(test, [text] * len(test))


def config_of(aspect: str) -> Config:
    config = from_dict(summaries.get_config())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, answer_field=aspect))


def references(config: Config, split: str) -> list[str]:
    """The summaries of a split."""
    task = make_task(config)
    assert task.text is not None
    return [
        decoded(task.text, pair.target)
        for pair in documents_of(config, make_mesh((1, 1, 1), jax.devices()[:1]), split, None)
    ]


def rows_of(aspect: str, runs: Sequence[dict[str, Any]], constant: dict[str, float]) -> list[str]:
    """The lines of an aspect: what the model says, as mean and standard deviation over seeds, and what others say."""
    lines = []
    for name, scores in {**runs[0]["scores"], "one text for all": constant}.items():
        cells = [f"{scores[measure]:.2f}" for measure in MEASURES]
        if name == "model":
            cells = [_spread([one["scores"][name][measure] for one in runs]) for measure in MEASURES]
        lines.append(f"| {aspect} | {name} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if values[1:] else 0:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/summaries", metavar="DIR", help="for the runs (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="as a trial")
    arguments = parser.parse_args()
    distributed.start()
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch if arguments.quick else arguments.workdir)
        aspects, seeds = (ASPECTS[-1:], SEEDS[:1]) if arguments.quick else (ASPECTS, SEEDS)
        overrides, batches = (QUICK, 1) if arguments.quick else ({}, None)
        results, lines = {}, ["| aspect | text | " + " | ".join(MEASURES.values()) + " |", "| --- " * 5 + "|"]
        for aspect in aspects:
            runs = [run(workdir, aspect, seed, overrides, batches) for seed in seeds]
            text, constant = typical(aspect, runs[0]["documents"])
            lines += rows_of(aspect, runs, constant)
            results[aspect] = {
                "seeds": dict(zip(map(str, seeds), runs, strict=True)),
                "one text for all": {"text": text, "scores": constant},
            }
    print("\n".join(lines))
    if not arguments.quick:
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
