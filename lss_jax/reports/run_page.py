"""The HTML page about one run, or about several side by side."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from lss_jax.config.schema import Config, ConfigError, flat_keys
from lss_jax.config.units import shown_size
from lss_jax.inspection.audit import audited, json_of
from lss_jax.inspection.topology import capacity_of
from lss_jax.models import build_model
from lss_jax.parallel.mesh import AXES
from lss_jax.reports.by_position import plot_of, shown_bin
from lss_jax.reports.figures import Curve, Plot
from lss_jax.reports.page import figures, page, paragraph, picture, section, table
from lss_jax.reports.runs import Run, caveats
from lss_jax.storage.metrics import Record
from lss_jax.tasks.task import Metric
from lss_jax.training.setup import mesh_of


def compiled(config: Config) -> dict[str, Any] | str:
    """The audit of the config's step on the local devices, as for JSON; or why it cannot be compiled for them."""
    devices, sizes = jax.devices(), dataclasses.astuple(config.mesh)[: len(AXES)]
    if -1 not in sizes:
        devices = devices[: math.prod(sizes)]
    try:
        mesh = mesh_of(config, devices)
    except ConfigError as error:
        return str(error)
    return json_of(audited(build_model(config, mesh), mesh), capacity_of(devices[0]))


def report(runs: Sequence[Run], audits: Sequence[dict[str, Any] | str]) -> str:
    """The page about these runs, as HTML; `audits` are those of `compiled`, one per run."""
    parts = [section("Results", results(runs, audits), *map(paragraph, caveats(runs)))]
    parts.append(section("Curves", curves(runs)))
    parts += [section(f"By position, {split} split", *by_position(runs, split)) for split in _splits(runs)]
    parts += [section("Pictures", *pictures_of(runs))] * any(run.pictures for run in runs)
    for run, audit in zip(runs, audits, strict=True):
        name = f" of {run.name}" if runs[1:] else ""
        parts.append(section(f"The compiled step{name}", *compiled_step(run, audit)))
    parts.append(section("Config", config_table(runs)))
    return page(("Run " if len(runs) == 1 else "Runs ") + ", ".join(run.name for run in runs), parts)


def results(runs: Sequence[Run], audits: Sequence[dict[str, Any] | str]) -> str:
    """The last numbers of each run, a column per run."""
    numbers_of_runs = [final_numbers(*pair) for pair in zip(runs, audits, strict=True)]
    rows = [[name, *(numbers[name] for numbers in numbers_of_runs)] for name in numbers_of_runs[0]]
    return table("Final numbers", ["", *(run.name for run in runs)], rows)


def final_numbers(run: Run, audit: dict[str, Any] | str) -> dict[str, str]:
    """The last numbers of a run, as text, by name."""
    config, last = run.config, {record["split"]: record for record in run.records}
    done = run.records[-1]["step"]
    metric = run.task.headline
    valid = [record for record in run.of("valid") if math.isfinite(record["loss"])]
    best = min(valid, key=lambda record: record["loss"], default=None)
    memory = None if isinstance(audit, str) else audit["memory"]["compiled"]
    return {
        "steps": f"{done:,} of {config.optim.steps:,}",
        f"train, {metric.label}": _shown_metric(last.get("train"), metric),
        f"valid, {metric.label}": _shown_metric(last.get("valid"), metric),
        f"lowest valid, {metric.label}": _shown_metric(best, metric) + (f" (step {best['step']:,})" if best else ""),
        f"test, {metric.label}": _shown_metric(last.get("test"), metric),
        "tokens trained on": f"{done * config.data.batch_size * config.data.seq_len:,}",
        "tokens per second, median": _shown(run.tokens_per_second(), ",.0f"),
        "updates skipped": f"{last['train']['skipped']:,}" if "train" in last else "-",
        "parameters": "-" if isinstance(audit, str) else f"{audit['parameters']:,}",
        "memory per device, compiled": shown_size(sum(memory.values())) if memory else "-",
    }


def curves(runs: Sequence[Run]) -> str:
    """Losses, learning rate, gradient norm and throughput over the steps; skipped updates are marked."""
    metric = runs[0].task.headline
    marks = tuple((float(step), style) for style, run in enumerate(runs) for step, _ in run.skips())
    skip_note = "".join(
        f" Updates skipped{' by ' + run.name if runs[1:] else ''}, up to the dotted lines: "
        + ", ".join(f"{count} by step {step:,}" for step, count in run.skips())
        + "."
        for run in runs
        if run.skips()
    )
    if runs[1:]:
        losses = [
            (Plot("step", metric.label, _curves(runs, "train", metric.name), marks), "Training loss." + skip_note),
            (Plot("step", metric.label, _curves(runs, "valid", metric.name, True)), "Validation loss."),
        ]
    else:
        (train,), (valid,) = (_curves(runs, split, metric.name, split == "valid") for split in ("train", "valid"))
        both = [train._replace(label="train"), valid._replace(label="valid", style=1)]
        losses = [(Plot("step", metric.label, both, marks), "Training and validation loss." + skip_note)]
    norms = _curves(runs, "train", "grad_norm")
    log_y = any(y > 0 for curve in norms for y in curve.y)
    return figures(
        *losses,
        (Plot("step", "learning rate", _curves(runs, "train", "learning_rate")), "Learning rate."),
        (
            Plot("step", "gradient norm", norms, marks, log_y=log_y),
            "Global norm of the gradient, before clipping." + skip_note,
        ),
        (Plot("step", "tokens per second", _curves(runs, "train", "tokens_per_second")), "Throughput."),
    )


def _curves(runs: Sequence[Run], split: str, key: str, dots: bool = False) -> list[Curve]:
    records = [run.of(split) for run in runs]
    return [
        Curve(run.name, [r["step"] for r in of_run], [r[key] for r in of_run], style, dots)
        for style, (run, of_run) in enumerate(zip(runs, records, strict=True))
    ]


def _splits(runs: Sequence[Run]) -> list[str]:
    return sorted({split for run in runs for split in run.by_position})


def by_position(runs: Sequence[Run], split: str) -> list[str]:
    """The figure over all runs that were evaluated by position on this split, and the table of its numbers."""
    metric = runs[0].task.headline
    items = " or ".join(sorted({run.task.items for run in runs}))
    windows = {
        f"{run.name + ', ' if runs[1:] else ''}windows of {window['length']:,}": (
            run.by_position[split]["step"],
            window,
        )
        for run in runs
        if split in run.by_position
        for window in run.by_position[split]["windows"]
    }
    firsts = {tuple(b["before"]) for _, window in windows.values() for b in window["bins"]}
    cells = [{tuple(b["before"]): b[metric.name] for b in window["bins"]} for _, window in windows.values()]
    rows = [[shown_bin([*before]), *(_shown(c.get(before), ".4f") for c in cells)] for before in sorted(firsts)]
    rows.append(["all", *(_shown(window[metric.name], ".4f") for _, window in windows.values())])
    rows.append(["at step", *(f"{step:,}" for step, _ in windows.values())])
    caption = f"{metric.label.capitalize()} of the {split} split by how many {items} came before in the window"
    drawn = plot_of(runs[0].task, {label: window for label, (_, window) in windows.items()})
    return [figures((drawn, caption + ".")), table(caption, [f"{items} before", *windows], rows)]


def pictures_of(runs: Sequence[Run]) -> list[str]:
    """The pictures of predictions of all runs, by split."""
    return [
        picture(png, f"Images of the {split} split{' in ' + run.name if runs[1:] else ''}: labels and predictions.")
        for run in runs
        for split, png in run.pictures.items()
    ]


def compiled_step(run: Run, audit: dict[str, Any] | str) -> list[str]:
    """The section on the compiled step: its devices, and its memory and collectives beside the predictions."""
    if isinstance(audit, str):
        return [paragraph(f"Not compiled, since it cannot be on the devices at hand: {audit}")]
    sizes = " x ".join(f"{axis}={size}" for axis, size in audit["mesh"].items())
    filled = (
        " These devices fill the axis for which the config has -1."
        if -1 in dataclasses.astuple(run.config.mesh)
        else ""
    )
    where = f"Compiled for {math.prod(audit['mesh'].values())} {audit['device']}, mesh {sizes}.{filled}"
    agrees = "As predicted." if not audit["problems"] else "Differs: " + "; ".join(audit["problems"])
    memory, predicted = audit["memory"]["compiled"], audit["memory"]["predicted"]
    sums = [*predicted, "all"]
    known = [{**each, "all": sum(each.values())} if each else {} for each in (memory, predicted)]
    rows = [[name, *(shown_size(each[name]) if each else "-" for each in known)] for name in sums]
    return [
        paragraph(f"{where} {agrees}"),
        table("Memory per device; predicted temporaries are an upper bound", ["", "compiled", "predicted"], rows),
        collectives(audit["collectives"]),
    ]


def collectives(found: dict[str, Any]) -> str:
    """The table of one step's collectives, compiled and predicted; MB are of their results, per device."""
    lines = [
        {(r["place"], r["kind"], ", ".join(r["axes"])): r for r in found[k] or []} for k in ("compiled", "predicted")
    ]
    if not any(lines):
        return paragraph("No collectives.")
    rows = []
    for line in sorted({*lines[0], *lines[1]}):
        pair = [each.get(line) for each in lines]
        shown = [cell for r in pair for cell in ((f"{r['times']:,}", f"{r['bytes'] / 1e6:,.3f}") if r else ("-", "-"))]
        rows.append([*line, *shown])
    header = ["in", "kind", "over", "compiled, times", "MB", "predicted, times", "MB"]
    return table("Collectives per step; MB are of their results on one device", header, rows, words=2)


def config_table(runs: Sequence[Run]) -> str:
    """The table of all config keys of one run, or of those in which several differ."""
    flats = [flat_keys(run.config) for run in runs]
    keys = [key for key in flats[0] if not runs[1:] or any(values[key] != flats[0][key] for values in flats)]
    caption = "Config keys that differ" if runs[1:] else "All config keys"
    if not keys:
        return paragraph("All config keys are the same.")
    rows = [[key, *(str(values[key]) for values in flats)] for key in keys]
    return table(caption, ["key", *(run.name for run in runs)], rows, words=len(runs))


def _shown_metric(record: Record | None, metric: Metric) -> str:
    return _shown(record[metric.name] if record else None, ".4f")


def _shown(number: float | None, form: str) -> str:
    """A number as text, `-` for None."""
    if number is None:
        return "-"
    return format(number, form) if math.isfinite(number) else "not finite"
