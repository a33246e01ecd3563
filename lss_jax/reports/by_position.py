"""Bits per byte by how much came before: the loss of each position of a window, in bins of powers of two.

The byte after natural position `i` of a window has `i + 1` bytes before it there; with a narrower attention window, or
packed documents, a model sees fewer of them. Windows follow one another in the split, so that every length predicts the
same bytes, each once (but those of a prefix), and a longer window differs in what it shows alone.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lss_jax.config.schema import Config, ConfigError, gather_problems
from lss_jax.data.sources import open_splits
from lss_jax.models import Model, Params, build_model
from lss_jax.models.losses import LossSum
from lss_jax.parallel.layout import Layout, layout_on
from lss_jax.parallel.mesh import shardings
from lss_jax.reports.figures import Curve, Plot
from lss_jax.storage.metrics import bits_per_byte
from lss_jax.storage.workdir import check_workdir
from lss_jax.training.evaluation import Split, losses_on, restore_params
from lss_jax.training.setup import mesh_of, validate
from lss_jax.training.state import kept_specs
from lss_jax.training.step import make_position_step


class Sums(NamedTuple):
    """Sums of each natural position, float64 `[L]`, of a window of `L` tokens."""

    nats_L: np.ndarray
    tokens_L: np.ndarray


def parse_lengths(written: str) -> list[int]:
    """The lengths of `128,256,512`, in rising order.

    Raises:
      ConfigError: these are no lengths.
    """
    parts = written.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts) or len({*map(int, parts)}) < len(parts):
        raise ConfigError(f"--lengths={written} is no list of lengths; write different numbers, as in 128,256,512")
    return sorted(map(int, parts))


def evaluate_by_position(
    config: Config, workdir: Path, name: str, lengths: list[int], batches: int | None
) -> dict[str, Any]:
    """The losses by position of the newest sound checkpoint on a split, for windows of each length; as JSON has it."""
    check_workdir(config, workdir)
    of_length = {length: at_length(config, length) for length in lengths}
    gather_problems(*(lambda c=c: validate(c, len(jax.devices())) for c in of_length.values()))
    mesh = mesh_of(config, jax.devices())
    data = open_splits(of_length[lengths[-1]].data)[name]
    splits = {length: Split(data, of_length[length], mesh) for length in lengths}
    step, params = restore_params(build_model(config), mesh, workdir)
    rows = []
    for length in lengths:
        model = build_model(of_length[length])
        sums = sums_by_position(model, mesh, shortened(params, model, mesh), splits[length], name, batches)
        rows.append({"length": length, **totals(sums), "bins": binned(sums)})
    return {"step": step, "split": name, "windows": rows}


def at_length(config: Config, length: int) -> Config:
    """The config for windows of `length` tokens.

    Raises:
      ConfigError: the learned table has no rows for so many.
    """
    if config.model.positions == "learned" and length > config.data.seq_len:
        raise ConfigError(
            f'--lengths: {length} is beyond the table of model.positions="learned", which has data.seq_len='
            f"{config.data.seq_len} rows; evaluate at most so many, or train with rope, sinusoidal or none"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=length))


def shortened(params: Params, model: Model, mesh: Mesh) -> Params:
    """The parameters with as many rows of a learned table as this model's windows are long."""
    placed = shardings(kept_specs(model, mesh), mesh)
    cut = jax.jit(
        lambda params: jax.tree.map(lambda p, shape: p[: shape.shape[0]], params, model.shapes), out_shardings=placed
    )
    return cut(params)


def sums_by_position(model: Model, mesh: Mesh, params: Params, split: Split, name: str, batches: int | None) -> Sums:
    """Sums over the first `batches` batches of a split, None for all of it."""
    length, layout = model.config.data.seq_len, layout_on(model.config, mesh)
    total = Sums(np.zeros(length), np.zeros(length))
    for sums in losses_on(make_position_step(model, mesh), params, split, name, batches):
        total = Sums(*map(np.add, total, in_natural_order(sums, layout, length)))
    return total


def in_natural_order(sums: LossSum, layout: Layout, length: int) -> Sums:
    """Global sums in layout order, as the mesh has them, on every host: without padding, one number per position."""
    whole = [multihost_utils.process_allgather(each, tiled=True) for each in sums]
    order = np.argsort(layout.positions(len(whole[0])))[:length]
    return Sums(*(each.astype(np.float64)[order] for each in whole))


def binned(sums: Sums) -> list[dict[str, Any]]:
    """By how many bytes came before: 1, 2, 3-4, 5-8 and so on to the length; bins where nothing counts are left out."""
    length = len(sums.tokens_L)
    ends = [2**power for power in range(math.ceil(math.log2(length)))] + [length]
    bins = [(first + 1, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    of_bins = [{"before": [a, b], **totals(Sums(sums.nats_L[a - 1 : b], sums.tokens_L[a - 1 : b]))} for a, b in bins]
    return [of_bin for of_bin in of_bins if of_bin["bytes"]]


def totals(sums: Sums) -> dict[str, Any]:
    """Loss over all positions, and how many bytes were predicted there."""
    count = float(sums.tokens_L.sum())
    loss = float(sums.nats_L.sum()) / max(count, 1.0)
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss), "bytes": round(count)}


def table_of(result: dict[str, Any]) -> str:
    """For a terminal: a row per bin, a column per length of window."""
    windows = result["windows"]
    lines = [
        f"step {result['step']}  {result['split']}  bits per byte by bytes before, in windows of",
        f"{'before':>15}" + "".join(f"{window['length']:>12,}" for window in windows),
    ]
    cells = [{shown_bin(of_bin["before"]): of_bin["bits_per_byte"] for of_bin in window["bins"]} for window in windows]
    firsts = {shown_bin(of_bin["before"]): tuple(of_bin["before"]) for window in windows for of_bin in window["bins"]}
    for shown in sorted(firsts, key=lambda shown: firsts[shown]):
        lines.append(f"{shown:>15}" + "".join(f"{c[shown]:>12.4f}" if shown in c else f"{'-':>12}" for c in cells))
    lines.append(f"{'all':>15}" + "".join(f"{window['bits_per_byte']:>12.4f}" for window in windows))
    lines.append(f"{'bytes':>15}" + "".join(f"{window['bytes']:>12,}" for window in windows))
    return "\n".join(lines)


def shown_bin(before: list[int]) -> str:
    """`3-4`, or `1` for a bin of one."""
    first, last = before
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def plot_of(windows: dict[str, dict[str, Any]]) -> Plot:
    """Windows under their labels, each as a curve through its bins, at the bins' last places."""
    curves = [
        Curve(
            label,
            [of_bin["before"][1] for of_bin in window["bins"]],
            [of_bin["bits_per_byte"] for of_bin in window["bins"]],
            style,
            dots=True,
        )
        for style, (label, window) in enumerate(windows.items())
    ]
    return Plot("bytes before, at most", "bits per byte", curves, log_x=True)
