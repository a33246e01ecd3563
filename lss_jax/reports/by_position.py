"""A task's headline metric by length of context: the losses by position in a window, in bins of powers of two.

The token after natural position `i` of a window has `i + 1` tokens before it there; with a narrower attention window,
or packed documents, a model sees fewer of them. Windows follow one another in the split, so that windows of every
length predict the same tokens, each once (except those of a prefix), and differ in their context alone.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from lss_jax.config.schema import Config, ConfigError, gather_problems
from lss_jax.data.split import WindowSplit
from lss_jax.models import Model, Params, build_model, resized
from lss_jax.parallel.layout import Layout, layout_on
from lss_jax.reports.figures import Curve, Plot
from lss_jax.tasks import Task, make_task
from lss_jax.tasks.task import means_of, values_of
from lss_jax.training.compatibility import check_workdir
from lss_jax.training.evaluation import restore_params, sums_on
from lss_jax.training.setup import mesh_of, validate
from lss_jax.training.state import param_shardings
from lss_jax.training.step import make_position_step


def parse_lengths(written: str) -> list[int]:
    """The lengths of `128,256,512`, in rising order.

    Raises:
      ConfigError: it is no list of different positive integers.
    """
    parts = written.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts) or len({*map(int, parts)}) < len(parts):
        raise ConfigError(f"--lengths={written} is no list of lengths; write different numbers, as in 128,256,512")
    return sorted(map(int, parts))


def evaluate_by_position(
    config: Config, workdir: Path, name: str, lengths: list[int], batches: int | None
) -> dict[str, Any]:
    """Metrics by position of a run's newest sound checkpoint on a split, for windows of each length; ready for JSON.

    Raises:
      ConfigError: there is no run or no checkpoint, or a length does not fit the config, the data or the devices.
    """
    check_workdir(config, workdir, trains=False)
    if not make_task(config).by_position:
        raise ConfigError(
            f"--by-position has no meaning for task={config.task!r}, which predicts nothing from what came "
            f"before; leave it out"
        )
    configs = {length: at_length(config, length) for length in lengths}
    gather_problems(*(lambda c=c: validate(c, len(jax.devices()), trains=False) for c in configs.values()))
    mesh = mesh_of(config, jax.devices(), trains=False)
    tasks = {length: make_task(c) for length, c in configs.items()}
    splits = {length: tasks[length].splits(mesh)[name] for length in reversed(lengths)}  # the longest may be too long
    step, params = restore_params(build_model(config, mesh), mesh, workdir)
    windows = []
    for length in lengths:
        model = build_model(configs[length], mesh)
        sums = sums_by_position(model, mesh, shortened(params, model, mesh), splits[length], name, batches)
        windows.append({"length": length, **totals(tasks[length], sums), "bins": binned(tasks[length], sums)})
    return {"step": step, "split": name, "windows": windows}


def at_length(config: Config, length: int) -> Config:
    """The config for windows of `length` tokens.

    Raises:
      ConfigError: the table of learned positions has fewer rows.
    """
    if config.model.positions == "learned" and length > config.data.seq_len:
        raise ConfigError(
            f'--lengths: {length} is beyond the table of model.positions="learned", which has data.seq_len='
            f"{config.data.seq_len} rows; use lengths up to that, or train with rope, sinusoidal or none"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=length))


def shortened(params: Params, model: Model, mesh: Mesh) -> Params:
    """Global parameters with the tables of learned positions cropped to the length of this model's windows."""

    def crop(table: jax.Array, like: Any, placed: NamedSharding) -> jax.Array:
        if table.shape == like.shape:
            return table
        return jax.jit(lambda table: resized(table, like.shape), out_shardings=placed)(table)

    return jax.tree.map(crop, params, model.shapes, param_shardings(model, mesh))


def sums_by_position(
    model: Model, mesh: Mesh, params: Params, split: WindowSplit, name: str, batches: int | None
) -> Any:
    """The task's sums by position over the first `batches` batches of a split, None for all: float64, `[L]` each."""
    length, layout = model.config.data.seq_len, layout_on(model.config, mesh)
    found = (
        in_natural_order(sums, layout, length)
        for sums in sums_on(make_position_step(model, mesh), params, split, name, batches)
    )
    return functools.reduce(lambda total, sums: jax.tree.map(np.add, total, sums), found)


def in_natural_order(sums: Any, layout: Layout, length: int) -> Any:
    """Moves global sums from layout order to natural order, without padding, on every host: `[length]` each."""

    def ordered(each: jax.Array) -> np.ndarray:
        whole_L = multihost_utils.process_allgather(each, tiled=True).astype(np.float64)
        return whole_L[np.argsort(layout.positions(len(whole_L)))[:length]]

    return jax.tree.map(ordered, sums)


def binned(task: Task, sums: Any) -> list[dict[str, Any]]:
    """The metrics in bins of 1, 2, 3-4, 5-8 and so on items before; bins in which nothing counts are left out."""
    length = len(sums[-1])
    ends = [2**power for power in range(math.ceil(math.log2(length)))] + [length]
    bins = [(first + 1, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    bin_totals = [
        {"before": [a, b], **totals(task, jax.tree.map(lambda each_L, a=a, b=b: each_L[a - 1 : b], sums))}
        for a, b in bins
    ]
    return [one for one in bin_totals if one[task.items]]


def totals(task: Task, sums: Any) -> dict[str, Any]:
    """The task's metrics over all positions, and the number of items counted."""
    total = jax.tree.map(lambda each_L: each_L.sum(0), sums)
    return {**values_of(task, means_of(total)), task.items: round(float(total[-1]))}


def table_of(task: Task, result: dict[str, Any]) -> str:
    """The result as text for a terminal: a row per bin, a column per window length."""
    windows, metric = result["windows"], task.headline
    lines = [
        f"step {result['step']}  {result['split']}  {metric.label} by {task.items} before, in windows of",
        f"{'before':>15}" + "".join(f"{window['length']:>12,}" for window in windows),
    ]
    cells = [{shown_bin(one["before"]): one[metric.name] for one in window["bins"]} for window in windows]
    firsts = {shown_bin(one["before"]): tuple(one["before"]) for window in windows for one in window["bins"]}
    for shown in sorted(firsts, key=lambda shown: firsts[shown]):
        lines.append(f"{shown:>15}" + "".join(f"{c[shown]:>12.4f}" if shown in c else f"{'-':>12}" for c in cells))
    lines.append(f"{'all':>15}" + "".join(f"{window[metric.name]:>12.4f}" for window in windows))
    lines.append(f"{task.items:>15}" + "".join(f"{window[task.items]:>12,}" for window in windows))
    return "\n".join(lines)


def shown_bin(before: list[int]) -> str:
    """A bin as text: `3-4`, or `1` for a bin of one."""
    first, last = before
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def plot_of(task: Task, windows: dict[str, dict[str, Any]]) -> Plot:
    """A plot with one curve per labelled window: a dot per bin, at the bin's last position."""
    curves = [
        Curve(
            label,
            [one["before"][1] for one in window["bins"]],
            [one[task.headline.name] for one in window["bins"]],
            style,
            dots=True,
        )
        for style, (label, window) in enumerate(windows.items())
    ]
    return Plot(f"{task.items} before, at most", task.headline.label, curves, log_x=True)
