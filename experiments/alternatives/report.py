"""The tables and the figures of this experiment."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.alternatives.costs import LENGTHS
from experiments.alternatives.models import MODELS
from experiments.alternatives.tasks import BUDGETS, TOKENS, Comparison, name_of
from experiments.tables import spread, table
from lss_jax.config.units import shown_size
from lss_jax.reports.figures import Curve, Plot, png_of

Found = dict[str, Any]


def seeds_of(found: Found, task: Comparison, model: str, budget: str) -> list[dict[str, Any]]:
    """The finished runs of all seeds; those at equal tokens also where the operations are equal too."""
    for of in (budget, TOKENS):
        start = f"{name_of(task, model, of)}, seed "
        runs = [run for key, run in found["runs"].items() if key.startswith(start)]
        if runs:
            return runs
    return []


def rows(found: Found, tasks: Sequence[Comparison], budget: str) -> list[list[str]]:
    lines = []
    for task in tasks:
        cells = []
        for model in MODELS:
            runs = seeds_of(found, task, model, budget) if model in task.models else []
            cells.append(spread([run["value"] for run in runs], 3) if runs else "-")
        lines.append([task.name, task.unit, *cells])
    return lines


def size_rows(found: Found, tasks: Sequence[Comparison]) -> list[list[str]]:
    """Parameters and steps: those at equal tokens, and at equal operations."""
    lines = []
    for task in tasks:
        cells = []
        for model in MODELS:
            runs = [seeds_of(found, task, model, budget) for budget in BUDGETS] if model in task.models else [[]]
            steps = " / ".join(f"{of_budget[0]['steps']:,}" for of_budget in runs if of_budget)
            cells.append(f"{runs[0][0]['parameters']:,}; {steps}" if runs[0] else "-")
        lines.append([task.name, *cells])
    return lines


def cost_rows(found: Found) -> list[list[str]]:
    def cell(model: str, length: int) -> list[str]:
        cost = found["costs"][f"{model}, {length}"]
        return [f"{cost['operations'] / 1e9:.2f}", shown_size(cost["sent"]), shown_size(cost["memory"])]

    return [[model, *(text for length in LENGTHS for text in cell(model, length))] for model in MODELS]


def tables(found: Found, tasks: Sequence[Comparison]) -> str:
    lines = []
    for budget in BUDGETS:
        lines += [*table([f"at equal {budget}", "", *MODELS], rows(found, tasks, budget)), ""]
    lines += [*table(["parameters; steps at equal tokens / operations", *MODELS], size_rows(found, tasks)), ""]
    head = [f"{what}, {length:,} tokens" for length in LENGTHS for what in ("GFLOP", "sent", "memory")]
    return "\n".join([*lines, *table(["per device and step", *head], cost_rows(found)), ""])


def by_position(found: Found, task: Comparison) -> Plot:
    """The mean over seeds by how many tokens came before, at equal tokens."""
    curves = []
    for style, model in enumerate(task.models):
        bins = [run["bins"] for run in seeds_of(found, task, model, TOKENS)]
        means = [(one[0][1], statistics.mean(values for _, _, values in one)) for one in zip(*bins, strict=True)]
        curves.append(Curve(model, [last for last, _ in means], [mean for _, mean in means], style, dots=True))
    return Plot("tokens before, at most", f"{task.unit}, {task.name}", curves, log_x=True)


def write_report(found: Found, tasks: Sequence[Comparison], out: Path, say: Callable[[str], None] = print) -> None:
    """Writes `results.md` and a figure for each task that is told by position."""
    text = tables(found, tasks)
    (out / "results.md").write_text(text)
    for task in tasks:
        if task.by_position and seeds_of(found, task, MODELS[0], TOKENS):
            (out / f"by_position_{task.name}.png").write_bytes(png_of(by_position(found, task)))
    say(text)
