"""Table 2: weak scaling at 348 tokens per device, up to the paper's 3,456 devices and 50,112 tokens.

    python -m experiments.paper.weak_scaling               # compiling takes pip install "jax[tpu]"

The paper (arXiv 2311.02382, Results): sequence groups of 6, 36 and 144 GPUs, and 144 x 24 data groups, at a
weak-scaling efficiency of 161%: operations per second and device over those of the smallest group. It can exceed 100%
because the work per token grows with the sequence (attention is quadratic), while a small group's step is mostly
overhead.

*Compiled*, for real tori of TPU v5p (except the six chips, a 2 x 3 host that nobody can rent): operations, bytes sent
and memory per device are read off the program. *Modelled* by `machines.py`: the seconds, and so the efficiency and the
share of the step in communication, all of it exposed: the compiler makes none of these collectives asynchronous. The
last column is the efficiency if all of it were hidden. A step's time counts the operations that its program computes;
efficiency counts those of the algorithm, as the paper does: all scores, masked ones too, but no padding of 348 queries
to a kernel's block, so that what is computed in vain does not count as efficient.
"""

import argparse
from typing import Any

from matplotlib.figure import Figure

from experiments.paper.programs import BLOCKWISE, DENSE, TOKENS, Row, chips, compiled, config_of, table, write
from lss_jax.runtime import distributed

NAME = "weak_scaling"
PAPER = "161%"
MESHES = ((1, 6, 1), (1, 36, 1), (1, 144, 1), (24, 144, 1))
KERNELS: dict[str, Row] = {"dense": DENSE, "blockwise": BLOCKWISE, "fused": {"attention.regather": True}}


def programs() -> list[Row]:
    """Each kernel on each mesh."""
    rows = []
    for name, changes in KERNELS.items():
        for mesh in MESHES:
            data, seq, _ = mesh
            row = compiled(config_of(mesh, TOKENS * seq, changes), chips(data * seq))
            rows.append({"rows": name, **row})
    deep = compiled(config_of(MESHES[-1], 50_112, {**KERNELS["fused"], "model.layers": 48}), chips(3456))
    return [*rows, {"rows": "fused, 48 layers", **deep}]


def efficiency(row: Row, rows: list[Row], hidden: bool) -> float:
    """The algorithm's operations per second and device over those of the smallest group."""
    smallest = next(other for other in rows if other["rows"] == row["rows"])
    return _rate(row, hidden) / _rate(smallest, hidden)


def _rate(row: Row, hidden: bool) -> float:
    seconds = row["modelled_seconds"]
    return row["algorithmic_operations"] / (max(seconds["compute"], seconds["memory"]) if hidden else seconds["total"])


def render(rows: list[Row]) -> str:
    """The table."""
    head = (
        "kernel | data x seq x model | devices | tokens | GFLOP | attention's share | the algorithm's share | sent, MB "
        "| parameters, MB | optimizer, MB | temporaries, MB | compile time, s | as predicted | step, ms "
        "| communication | weak-scaling efficiency | with communication hidden"
    )
    body = []
    for row in rows:
        seconds, memory = row["modelled_seconds"], row["memory"]
        body.append(
            (
                row["rows"],
                row["mesh"],
                f"{row['devices']:,}",
                f"{row['seq_len']:,}",
                f"{row['operations'] / 1e9:,.1f}",
                f"{row['attention_operations'] / row['operations']:.0%}",
                f"{row['algorithmic_operations'] / row['operations']:.0%}",
                f"{row['sent'] / 1e6:,.1f}",
                *(f"{memory[name] / 1e6:,.1f}" for name in ("parameters", "optimizer state", "temporaries")),
                f"{row['compile_seconds']:.0f}",
                "; ".join(row["problems"]) or "yes",
                f"{seconds['total'] * 1e3:,.2f}",
                f"{seconds['communication'] / seconds['total']:.0%}",
                *(f"{efficiency(row, rows, hidden):.0%}" if row["rows"] in KERNELS else "" for hidden in (False, True)),
            )
        )
    return "\n".join(
        [
            "# Weak scaling",
            "",
            "Command: `python -m experiments.paper.weak_scaling`",
            "",
            f"The paper's model with {TOKENS} tokens per device; all figures are per device. The paper's efficiency at "
            f"3,456 devices: {PAPER}.",
            "Compiled for TPU v5p up to the column `as predicted`; the columns after it are modelled.",
            "",
            table(head, body),
        ]
    )


def plot(rows: list[Row]) -> Figure:
    """Efficiency and the share of communication over the number of devices."""
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2)
    for name in KERNELS:
        own = [row for row in rows if row["rows"] == name]
        devices = [f"{row['devices']:,}" for row in own]
        left.plot(devices, [100 * efficiency(row, rows, hidden=False) for row in own], marker="o", label=name)
        shares = [row["modelled_seconds"]["communication"] / row["modelled_seconds"]["total"] for row in own]
        right.plot(devices, [100 * share for share in shares], marker="o", label=name)
    left.set(xlabel="devices", ylabel="weak-scaling efficiency, %", title="operations per second and device (modelled)")
    right.set(xlabel="devices", ylabel="% of the step", title="communication (modelled, nothing hidden)")
    left.legend()
    figure.tight_layout()
    return figure


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    distributed.start_on_cpu(1)
    rows: list[dict[str, Any]] = programs()
    write(NAME, rows, render, plot)


if __name__ == "__main__":
    main()
