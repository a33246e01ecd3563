"""Table 1: LSS against Nvidia's sequence parallelism, the same model and the same tokens.

    python -m experiments.paper.head_to_head               # all; compiling takes pip install "jax[tpu]"
    python -m experiments.paper.head_to_head --only measured

The paper (arXiv 2311.02382, Results): on 144 GPUs LSS is 5.6 times as fast and takes 10.2 times less memory.

*Measured*: a step on 2, 4 and 8 simulated devices that share this machine's cores, the mesh 1 x N x 1 (LSS) against
1 x 1 x N (the baseline), taking turns; the time is the median over rounds of the ratio in the same round. Simulated
devices send through memory, so that this compares the work, not the network.

*Compiled*, for TPU v5p: the paper's model at 348 tokens per device. The baseline cuts heads, of which there are 8: 144
devices are 18 groups of 8 with a sequence each (36: 9 groups of 4). So LSS gets the same 18 (9) sequences per step, one
after the other over all devices (`optim.accumulate`): the same tokens, the same update, the same work for each device.
That is the paper's own comparison: what is cut no further must be repeated in data groups. Both recompute blocks
(`remat="block"`). With dense rows both hold scores in memory, as the paper's did; with blockwise rows neither.

Where the column `as predicted` says no, the audit finds other collectives than the formulas do, and the JSON has them:
on 128 chips, where the moments are cut, libtpu gathers all but two parameters in one sum of zeros with a share (those
two have shares that fill its tiles).

*Modelled*: the seconds of a step, by `machines.py`, from the compiled operations and collectives.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.paper.programs import (
    BLOCKWISE,
    DENSE,
    TOKENS,
    Mesh,
    Row,
    Step,
    chips,
    compiled,
    config_of,
    megabytes,
    read,
    table,
    write,
)
from lss_jax.runtime import distributed

NAME = "head_to_head"
PAPER = {"time": 5.6, "memory": 10.2}
GOALS = {"dense": 15, "blockwise": 60}  # times less memory than the baseline's dense rows, on 144 devices
SMALL: Row = {"model.layers": 4, "model.width": 256, "model.dtype": "float32"}
LENGTH = 2048  # tokens, on simulated devices
BASELINES = {36: (9, 1, 4), 144: (18, 1, 8)}
GROUPS = 8  # of heads, in which LSS moves keys and values where memory is short
KERNELS = {"dense": DENSE, "blockwise": BLOCKWISE}


def measured(devices: int, rounds: int) -> list[Row]:
    """Both on `devices` simulated devices, dense and blockwise."""
    rows = []
    for kernel, changes in KERNELS.items():
        meshes: dict[str, Mesh] = {"lss": (1, devices, 1), "baseline": (1, 1, devices)}
        configs = {name: config_of(mesh, LENGTH, {**SMALL, **changes}) for name, mesh in meshes.items()}
        steps = {name: Step(config, jax.devices()[:devices]) for name, config in configs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
        ratios = [one / other for one, other in zip(seconds["baseline"], seconds["lss"], strict=True)]
        rows.append(
            {
                "devices": devices,
                "kernel": kernel,
                "seq_len": LENGTH,
                "baseline_over_lss_seconds": statistics.median(ratios),
                "ratios": sorted(ratios),
                "temporaries": {name: step.temporaries for name, step in steps.items()},
                "seconds": {name: statistics.median(of_one) for name, of_one in seconds.items()},
            }
        )
        print(rows[-1], flush=True)
    return rows


def compiled_on(devices: int) -> list[Row]:
    """The baseline and LSS, dense and blockwise, LSS also with heads in groups."""
    absent, rows = chips(devices), []
    baseline = BASELINES[devices]
    for changes in KERNELS.values():
        for name, mesh, groups in (
            ("baseline", baseline, 1),
            ("lss", (1, devices, 1), 1),
            ("lss", (1, devices, 1), GROUPS),
        ):
            same = {"data.batch_size": baseline[0], "optim.accumulate": baseline[0] if name == "lss" else 1}
            config = config_of(mesh, TOKENS * devices, {**changes, **same, "attention.gather_groups": groups})
            rows.append({"name": name, **compiled(config, absent)})
    return rows


def one_sequence() -> list[Row]:
    """LSS alone with a single sequence: nothing to add up over microbatches; on 128 devices Adam's moments are cut."""
    rows = []
    for devices in (144, 128):
        for changes in KERNELS.values():
            groups = {"attention.gather_groups": GROUPS, "optim.shard_state": True}
            row = compiled(config_of((1, devices, 1), TOKENS * devices, {**changes, **groups}), chips(devices))
            rows.append({"name": "lss", **row})
    return rows


def render(results: dict[str, Any]) -> str:
    """All tables."""
    lines = [
        "# LSS against Nvidia's sequence parallelism",
        "",
        "Command: `python -m experiments.paper.head_to_head`",
        "",
    ]
    if "measured" in results:
        lines += [
            f"Measured on simulated devices that share two cores (4 layers, width 256, float32, {LENGTH:,} tokens, one "
            "sequence):",
            "",
            table(
                "devices | rows | time, baseline / LSS | temporaries, baseline | LSS | baseline / LSS",
                [_measured_row(row) for row in results["measured"]],
            ),
            "",
        ]
    if "compiled" in results:
        lines += _compiled(results["compiled"], results["one sequence"])
    return "\n".join(lines).rstrip()


def _compiled(rows: list[Row], single: list[Row]) -> list[str]:
    return [
        f"Compiled for TPU v5p, per device (6 layers, width 512, 8 heads, bfloat16, {TOKENS} tokens per device, the "
        f"same sequences per step); the paper on 144 GPUs: {PAPER['time']} times the speed, {PAPER['memory']} times "
        "less memory. Milliseconds are modelled.",
        "",
        table(
            "devices | who | data x seq x model | rows | groups | sequences, in microbatches | state, MB "
            "| temporaries, MB | all, MB | less than the dense baseline | than the same rows "
            "| GFLOP | sent, MB | as predicted | step, ms | baseline / LSS",
            [_compiled_row(row, rows) for row in rows],
        ),
        "",
        "A single sequence, with Adam's moments cut (`optim.shard_state`) where the devices divide the width: the "
        f"goals were {GOALS['dense']} times (dense rows) and {GOALS['blockwise']} times (blockwise) less than the "
        "baseline's dense rows on 144 devices.",
        "",
        table(
            "devices | tokens | rows | groups | parameters, MB | optimizer, MB | temporaries, MB | all, MB "
            "| less than the dense baseline of 144 | as predicted",
            [_single_row(row, rows) for row in single],
        ),
    ]


def _measured_row(row: Row) -> tuple:
    lss, baseline = row["temporaries"]["lss"], row["temporaries"]["baseline"]
    ratio = f"{row['baseline_over_lss_seconds']:.2f}"
    return row["devices"], row["kernel"], ratio, megabytes(baseline), megabytes(lss), f"{baseline / lss:.1f}"


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
        row["gather_groups"],
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


def _single_row(row: Row, rows: list[Row]) -> tuple:
    classes = [f"{row['memory'][name] / 1e6:,.1f}" for name in ("parameters", "optimizer state", "temporaries")]
    less = _baseline(rows, 144, "dense")["memory_total"] / row["memory_total"]
    total = f"{row['memory_total'] / 1e6:,.1f}"
    return (
        row["devices"],
        f"{row['seq_len']:,}",
        row["kernel"],
        row["gather_groups"],
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
    labels = [f"{row['name']}\n{row['kernel']}, {row['gather_groups']}" for row in rows]
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    bottom = np.zeros(len(rows))
    for name in ("parameters", "optimizer state", "temporaries"):
        sizes = np.array([row["memory"][name] / 1e6 for row in rows])
        axes.bar(labels, sizes, bottom=bottom, label=name)
        bottom += sizes
    axes.set(
        yscale="log", ylabel="MB per device", title="50,112 tokens on 144 TPU v5p, compiled (rows, groups of heads)"
    )
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each program (default: 5)")
    parser.add_argument("--only", choices=("measured", "compiled"), help="do this part again, keep the other")
    arguments = parser.parse_args()
    distributed.start_on_cpu(8)
    results = read(NAME)
    if arguments.only != "compiled":
        results["measured"] = [row for devices in (2, 4, 8) for row in measured(devices, arguments.rounds)]
    if arguments.only != "measured":
        results["compiled"] = [row for devices in BASELINES for row in compiled_on(devices)]
        results["one sequence"] = one_sequence()
    write(NAME, results, render, plot)


if __name__ == "__main__":
    main()
