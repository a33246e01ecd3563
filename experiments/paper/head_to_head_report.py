"""The tables and the plot of `head_to_head.py`, from its results."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.paper.programs import TOKENS, Row, megabytes, table

PAPER = {"time": 5.6, "memory": 10.2}
GOALS = {"dense": 15, "blockwise": 60}  # memory of the baseline's dense kernel over this, on 144 devices
CLASSES = ("parameters", "optimizer state", "temporaries")  # of memory


def render(results: dict[str, Any]) -> str:
    """All tables."""
    lines = [
        "# LSS against Nvidia's sequence parallelism",
        "",
        "Command: `python -m experiments.paper.head_to_head`",
        "",
    ]
    if "measured" in results:
        lines += _measured(results["measured"])
    if "compiled" in results:
        lines += _compiled(results["compiled"])
        lines += _one_sequence(results["one sequence"], results["compiled"])
    return "\n".join(lines).rstrip()


def _measured(rows: list[Row]) -> list[str]:
    return [
        f"Measured on simulated devices that share two cores (4 layers, width 256, float32, {rows[0]['seq_len']:,} "
        "tokens, one sequence):",
        "",
        table(
            "devices | kernel | time, baseline / LSS | temporaries, baseline | temporaries, LSS "
            "| temporaries, baseline / LSS",
            [_measured_row(row) for row in rows],
        ),
        "",
    ]


def _measured_row(row: Row) -> tuple:
    lss, baseline = row["temporaries"]["lss"], row["temporaries"]["baseline"]
    ratio = f"{row['baseline_over_lss_seconds']:.2f}"
    return row["devices"], row["kernel"], ratio, megabytes(baseline), megabytes(lss), f"{baseline / lss:.1f}"


def _compiled(rows: list[Row]) -> list[str]:
    return [
        f"Compiled for TPU v5p, per device (6 layers, width 512, 8 heads, bfloat16, {TOKENS} tokens per device, the "
        f"same sequences per step); the paper on 144 GPUs: {PAPER['time']} times the speed, {PAPER['memory']} times "
        "less memory. Step times are modelled. A ratio above 1 is in favour of this row.",
        "",
        table(
            "devices | method | data x seq x model | kernel | head groups | sequences in microbatches | state, MB "
            "| temporaries, MB | total, MB | total, dense baseline / this | total, baseline of the same kernel / this "
            "| GFLOP | sent, MB | as predicted | step, ms | step, baseline of the same kernel / this",
            [_compiled_row(row, rows) for row in rows],
        ),
        "",
    ]


def _compiled_row(row: Row, rows: list[Row]) -> tuple:
    dense, same = (_baseline(rows, row["devices"], kernel) for kernel in ("dense", row["kernel"]))
    memory, seconds = row["memory"], row["modelled_seconds"]["total"]
    state = row["memory_total"] - memory["temporaries"]
    figures = [f"{size / 1e6:,.1f}" for size in (state, memory["temporaries"], row["memory_total"])]
    return (
        row["devices"],
        row["name"],
        row["mesh"],
        row["kernel"],
        row["head_groups"],
        f"{row['sequences']} in {row['microbatches']}",
        *figures,
        f"{dense['memory_total'] / row['memory_total']:.1f}",
        f"{same['memory_total'] / row['memory_total']:.1f}",
        f"{row['operations'] / 1e9:,.0f}",
        f"{row['sent'] / 1e6:,.0f}",
        _as_predicted(row),
        f"{seconds * 1e3:,.1f}",
        f"{same['modelled_seconds']['total'] / seconds:.2f}",
    )


def _one_sequence(single: list[Row], rows: list[Row]) -> list[str]:
    return [
        "One sequence, with Adam's moments sharded (`mesh.shard`) where the number of devices divides the "
        f"width. The goals were {GOALS['dense']} times (dense) and {GOALS['blockwise']} times (blockwise) less memory "
        "than the dense baseline on 144 devices.",
        "",
        table(
            "devices | tokens | kernel | head groups | parameters, MB | optimizer, MB | temporaries, MB | total, MB "
            "| total, dense baseline on 144 / this | as predicted",
            [_single_row(row, rows) for row in single],
        ),
    ]


def _single_row(row: Row, rows: list[Row]) -> tuple:
    classes = [f"{row['memory'][name] / 1e6:,.1f}" for name in CLASSES]
    less = _baseline(rows, 144, "dense")["memory_total"] / row["memory_total"]
    total = f"{row['memory_total'] / 1e6:,.1f}"
    return (
        row["devices"],
        f"{row['seq_len']:,}",
        row["kernel"],
        row["head_groups"],
        *classes,
        total,
        f"{less:.1f}",
        _as_predicted(row),
    )


def _as_predicted(row: Row) -> str:
    return "no" if row["problems"] else "yes"


def _baseline(rows: list[Row], devices: int, kernel: str) -> Row:
    return next(row for row in rows if (row["name"], row["devices"], row["kernel"]) == ("baseline", devices, kernel))


def plot(results: dict[str, Any]) -> Figure:
    """Memory per device by class, on 144 devices."""
    rows = [row for row in results.get("compiled", []) if row["devices"] == 144]
    labels = [f"{row['name']}\n{row['kernel']}, {row['head_groups']}" for row in rows]
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    bottom = np.zeros(len(rows))
    for name in CLASSES:
        sizes = np.array([row["memory"][name] / 1e6 for row in rows])
        axes.bar(labels, sizes, bottom=bottom, label=name)
        bottom += sizes
    axes.set(
        yscale="log", ylabel="MB per device", title="50,112 tokens on 144 TPU v5p, compiled (kernel, groups of heads)"
    )
    axes.legend()
    return figure
