"""Table 3: the longest sequence that fits, over the number of devices.

    python -m experiments.paper.longest

The paper (arXiv 2311.02382, Results): 50,112 tokens on 144 GPUs of 16 GB to a sequence, where its baseline stops far
below. Here one sequence is sharded over all devices, of 16 GiB each, in the paper's model (6 layers, width 512, 8
heads, bfloat16, blocks recomputed in the backward pass).

*Modelled*: the longest length by the planner's memory model, an upper bound (`lss_jax/inspection/memory.py`).
*Compiled*, for 8 simulated CPU devices: the program at that length, so that the bound can be judged. CPUs compute
bfloat16 in float32, so real machines hold more. The baseline shards heads: beyond 8 devices it gains nothing, and the
other devices train on other sequences. Hybrids shard the sequence over N/2 or N/8 devices and the heads over 2 or 8.
"""

import argparse
from typing import Any

import jax
from matplotlib.figure import Figure

from experiments.paper.programs import BLOCKWISE, DENSE, Mesh, Row, config_of, table, write
from lss_jax.config.schema import ConfigError
from lss_jax.inspection.memory import shortfall
from lss_jax.inspection.planner import Room, evaluate
from lss_jax.models import build_model
from lss_jax.parallel.mesh import make_mesh
from lss_jax.runtime import distributed
from lss_jax.training.step import trace_train_step

NAME = "longest"
MEMORY = 16 * 2**30
DEVICES = (1, 2, 4, 8, 16, 36, 64, 144, 256)
COMPILED = 8


def methods(devices: int) -> dict[str, tuple[Mesh, str, Row]]:
    """The methods by name: mesh, strategy and config changes; devices beyond a sequence group form data groups."""
    heads = max(size for size in (1, 2, 4, 8) if devices % size == 0)
    own: dict[str, tuple[Mesh, str, Row]] = {
        "LSS, dense (the paper's)": ((1, devices, 1), "lss", DENSE),
        "LSS, blockwise": ((1, devices, 1), "lss", BLOCKWISE),
        "ring, blockwise": ((1, devices, 1), "ring", {}),
        "baseline, dense": ((devices // heads, 1, heads), "lss", DENSE),
        "baseline, blockwise": ((devices // heads, 1, heads), "lss", BLOCKWISE),
    }
    if devices > 2 and heads > 1:
        own["hybrid, LSS x 2, blockwise"] = ((1, devices // 2, 2), "lss", BLOCKWISE)
    if devices > 8 and heads == 8:
        own["hybrid, LSS x 8, blockwise"] = ((1, devices // 8, 8), "lss", BLOCKWISE)
    return own


def longest(devices: int) -> list[Row]:
    """The longest sequence of each method on this many devices."""
    rows = []
    for name, (sizes, strategy, changes) in methods(devices).items():
        try:
            cost = evaluate(config_of(sizes, 1152, changes), sizes, strategy, Room(MEMORY, None)).longest
        except ConfigError as error:
            rows.append({"name": name, "devices": devices, "mesh": sizes, "seq_len": 0, "why": str(error)})
            continue
        rows.append(
            {
                "name": name,
                "devices": devices,
                "mesh": sizes,
                "seq_len": cost.seq_len,
                "memory": cost.memory._asdict(),
                "sent": cost.sent,
                "compiled": compiled(sizes, strategy, cost.seq_len, changes) if devices == COMPILED else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def compiled(sizes: Mesh, strategy: str, seq_len: int, changes: Row) -> int | None:
    """Bytes per device that the compiled program needs; None if it does not fit."""
    own = {**changes, "attention.strategy": strategy, "attention.regather": strategy == "lss"}
    model = build_model(config_of(sizes, seq_len, own))
    mesh = make_mesh(sizes, jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    try:
        analysis = trace_train_step(model, mesh).lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        print(shortfall(error))
        return None
    assert analysis is not None
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def render(rows: list[Row]) -> str:
    """Lengths by method and number of devices, and the compiled memory on eight."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    of = {(row["name"], row["devices"]): row for row in rows}
    lengths = [
        (name, *(f"{of[name, count]['seq_len']:,}" if (name, count) in of else "" for count in DEVICES))
        for name in names
    ]
    checked = [row for row in rows if row.get("compiled")]
    return "\n".join(
        [
            "# The longest sequence",
            "",
            "Command: `python -m experiments.paper.longest`",
            "",
            "Tokens that fit in 16 GiB per device on N devices, modelled (an upper bound of memory, so a lower "
            "bound of length):",
            "",
            table(f"method | {' | '.join(f'N = {count}' for count in DEVICES)}", lengths),
            "",
            f"On {COMPILED} simulated devices, compiled at that length:",
            "",
            table(
                "method | tokens | compiled, GiB | predicted over compiled | sent per step, GiB (modelled)",
                [
                    (
                        row["name"],
                        f"{row['seq_len']:,}",
                        f"{row['compiled'] / 2**30:.2f}",
                        f"{sum(row['memory'].values()) / row['compiled'] - 1:+.1%}",
                        f"{row['sent'] / 2**30:.2f}",
                    )
                    for row in checked
                ],
            ),
        ]
    )


def plot(rows: list[Row]) -> Figure:
    """Length over the number of devices, a line per method."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name and row["seq_len"]]
        axes.plot([row["devices"] for row in own], [row["seq_len"] for row in own], marker="o", label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="devices", ylabel="tokens", title="the longest sequence in 16 GiB (modelled)"
    )
    axes.set_xticks(DEVICES, map(str, DEVICES))
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    distributed.start_on_cpu(COMPILED)
    rows: list[dict[str, Any]] = [row for devices in DEVICES for row in longest(devices)]
    write(NAME, rows, render, plot)


if __name__ == "__main__":
    main()
