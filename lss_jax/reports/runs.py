"""Runs as their workdirs describe them, and whether their losses can be compared."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lss_jax.config.schema import Config, ConfigError, from_dict, gather_problems
from lss_jax.storage.checkpoint import newest_notes
from lss_jax.storage.metrics import Record, checked_records
from lss_jax.storage.workdir import saved_config
from lss_jax.tasks import make_task
from lss_jax.tasks.task import Task

BY_POSITION = "by_position"  # by_position_SPLIT.json and .png, written by `evaluate --by-position`
PICTURES = "pictures"  # pictures_SPLIT.png, written by `evaluate --pictures`


class Run(NamedTuple):
    """One run as its workdir describes it; nothing here depends on the local devices."""

    name: str
    workdir: Path
    config: Config
    records: list[Record]
    data: dict[str, Any] | None  # size and fingerprint from the newest checkpoint; None without one
    by_position: dict[str, dict[str, Any]]  # split to result
    pictures: dict[str, bytes]  # split to PNG file

    @property
    def task(self) -> Task:
        """The task of its config."""
        return make_task(self.config)

    def of(self, split: str) -> list[Record]:
        """The records of a split."""
        return [record for record in self.records if record["split"] == split]

    def skips(self) -> list[tuple[int, int]]:
        """The logged steps before which updates were skipped, and how many since the step logged before."""
        totals = [(0, 0), *((record["step"], record["skipped"]) for record in self.of("train"))]
        return [(step, now - before) for (_, before), (step, now) in itertools.pairwise(totals) if now > before]

    def tokens_per_second(self) -> float:
        """The median over the training records, nan without any."""
        return statistics.median(r["tokens_per_second"] for r in self.of("train")) if self.of("train") else math.nan


def read_runs(workdirs: Sequence[Path]) -> list[Run]:
    """The runs in these folders, named by them.

    Raises:
      ConfigError: a folder is named twice, is not that of a run, has no metrics yet, or holds damaged files.
    """
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise ConfigError("--compare: a run is given twice; compare different runs")
    short = [workdir.resolve().name for workdir in workdirs]
    names = short if len(set(short)) == len(short) else [str(workdir) for workdir in workdirs]
    return [_read(name, workdir) for name, workdir in zip(names, workdirs, strict=True)]


def _read(name: str, workdir: Path) -> Run:
    config = from_dict(saved_config(workdir))
    task = make_task(config)
    records = checked_records(workdir / "metrics.jsonl", (metric.name for metric in task.metrics))
    notes = newest_notes(workdir / "checkpoints")
    results = [_read_by_position(path, task) for path in sorted(workdir.glob(f"{BY_POSITION}_*.json"))]
    pictures = {path.stem.removeprefix(f"{PICTURES}_"): path for path in sorted(workdir.glob(f"{PICTURES}_*.png"))}
    return Run(
        name,
        workdir,
        config,
        records,
        notes and notes["data"],
        {r["split"]: r for r in results},
        {split: path.read_bytes() for split, path in pictures.items()},
    )


def _read_by_position(path: Path, task: Task) -> dict[str, Any]:
    metric, items = task.headline.name, task.items
    try:
        result = json.loads(path.read_bytes())
        for window in result["windows"]:
            _ = [result["step"] + window["length"] + window[metric] + window[items], result["split"] + ""]
            _ = [one["before"][0] + one["before"][1] + one[metric] for one in window["bins"]]
        return result
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"{path} is damaged; evaluate again with --by-position, or remove it") from error


def check_comparable(runs: Sequence[Run]) -> None:
    """Checks that all runs have the data of the first: losses on different texts cannot be compared.

    Raises:
      ConfigError: some do not; a line for each of them.
    """

    def check(run: Run) -> None:
        if _identity(run, runs[0]) != _identity(runs[0], run):
            raise ConfigError(
                f"--compare: {run.workdir} was trained on {_shown_data(run)}, but {runs[0].workdir} on "
                f"{_shown_data(runs[0])}, and losses on different data cannot be compared; give runs on the same data"
            )

    gather_problems(*(lambda run=run: check(run) for run in runs[1:]))


def _identity(run: Run, other: Run) -> Any:
    """What comparable runs share: task and fingerprint of the data, or its path if one has no checkpoint yet.

    Runs with different tokenizers have other tokens; they share the size of their text.
    """
    if not (run.data and other.data):
        return run.config.task, run.config.data.source, run.config.data.path
    same_tokens = run.config.data.tokenizer == other.config.data.tokenizer
    return run.config.task, run.data if same_tokens else run.data["text_bytes"]


def _shown_data(run: Run) -> str:
    data = run.config.data
    path = f" {data.path!r}" if data.path else ""
    size = f" ({run.data['bytes']:,} bytes, fingerprint {run.data['sha256'][:12]})" if run.data else ""
    return f"{data.source}{path}{size}"


def caveats(runs: Sequence[Run]) -> list[str]:
    """The reasons, apart from the models, why numbers of these runs may differ: a sentence each."""
    first, found = runs[0].config, []
    for run in runs[1:]:
        now = run.config
        counted = [c.eval_batches * c.data.batch_size * c.data.seq_len for c in (first, now)]
        if counted[0] != counted[1]:
            found.append(
                f"Validation is over the first {counted[1]:,} {run.task.items} in {run.name}, {counted[0]:,} in "
                f"{runs[0].name}."
            )
        if now.data.tokenizer != first.data.tokenizer:
            found.append(
                f"{run.name} and {runs[0].name} have different tokenizers: bits per byte can be compared, losses per "
                f"token cannot, and their splits of the text end at slightly different places."
            )
        deciding = run.task.counted()
        if deciding != runs[0].task.counted():
            keys, items = " or ".join(deciding), run.task.items
            found.append(f"By {keys} {run.name} predicts other {items} than {runs[0].name}.")
    return found
