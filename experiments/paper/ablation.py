"""Table 4: what each idea of the algorithm is worth, on its own.

    python -m experiments.paper.ablation

Each row leaves one idea out of the LSS training step, by replacing one function: keys and values in one all-gather and
their gradients in one reduce-scatter (against one each); that reduce-scatter (against an all-reduce, of which each
device uses its own segment); gradients averaged over `seq`, then `data` (against one all-reduce over all devices);
zigzag segments (against contiguous ones).

*Compiled*, on 2 x 4 simulated devices: collectives per step, bytes sent per device (by ring algorithms), temporaries.
*Measured* there: the time over that of the whole algorithm, the median over rounds in which all take turns. Simulated
devices share the cores and communicate through memory: time follows the work of all devices, so that balance, the
purpose of zigzag, hardly shows; the busiest device's attention (counted) shows it. Every variant's loss is the same.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from matplotlib.figure import Figure

from experiments.paper.programs import BLOCKWISE, Row, Step, config_of, megabytes, table, write
from lss_jax.attention import lss
from lss_jax.inspection import contract, hlo, operations
from lss_jax.inspection.contract import sent
from lss_jax.parallel.mesh import named_axes, sharded_axes
from lss_jax.parallel.residuals import COMMUNICATED
from lss_jax.parallel.scopes import GRADIENTS
from lss_jax.runtime import distributed
from lss_jax.training import step

NAME = "ablation"
SIZES = (2, 4, 1)
LENGTH, SEQUENCES = 2048, 4
SMALL: Row = {
    **BLOCKWISE,
    "attention.regather": False,
    "model.layers": 4,
    "model.width": 256,
    "model.dtype": "float32",
    "data.batch_size": SEQUENCES,
}


def gathered_apart(kv_2BGlK: jax.Array, axis: str) -> jax.Array:
    """One all-gather for the keys and one for the values: `kv_N2BGlK`."""
    return checkpoint_name(jnp.stack([jax.lax.all_gather(x_BGlK, axis) for x_BGlK in kv_2BGlK], axis=1), COMMUNICATED)


def scattered_apart(dkv_N2BGKl: jax.Array, axis: str) -> jax.Array:
    """One reduce-scatter for the gradient of the keys and one for that of the values."""
    return jnp.stack([jax.lax.psum_scatter(x_NBGKl, axis) for x_NBGKl in jnp.moveaxis(dkv_N2BGKl, 1, 0)])


def summed_everywhere(dkv_N2BGKl: jax.Array, axis: str) -> jax.Array:
    """An all-reduce, of which each device uses its own segment."""
    return jax.lax.psum(dkv_N2BGKl, axis)[jax.lax.axis_index(axis)]


def in_one_sum(partial: Any, specs: Any, mesh: Mesh) -> Any:
    """Gradients summed over all devices that replicate a parameter at once, instead of over `seq`, then `data`."""
    leaves, treedef = jax.tree.flatten(partial)
    missing = [
        tuple(axis for axis in sharded_axes(mesh) if axis not in named_axes(spec)) for spec in jax.tree.leaves(specs)
    ]
    for axes in dict.fromkeys(missing):
        group = [index for index, others in enumerate(missing) if others == axes]
        vector, unravel = ravel_pytree([leaves[index] for index in group])
        with jax.named_scope(GRADIENTS):
            summed = unravel(jax.lax.psum(vector, axes))
        for index, leaf in zip(group, summed, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves)


VARIANTS: dict[str, tuple[Row, dict[tuple[Any, str], Callable]]] = {
    "whole": ({}, {}),
    "keys and values apart": ({}, {(lss, "all_gather"): gathered_apart, (lss, "psum_scatter"): scattered_apart}),
    "all-reduce for reduce-scatter": ({}, {(lss, "psum_scatter"): summed_everywhere}),
    "one flat reduction of gradients": ({}, {(step, "double_sum"): in_one_sum}),
    "contiguous for zigzag": ({"attention.layout": "contiguous"}, {}),
}


def variant(name: str, devices: Sequence[jax.Device]) -> Step:
    """The compiled step of a variant."""
    changes, swapped = VARIANTS[name]
    with contextlib.ExitStack() as stack:
        for (module, function), other in swapped.items():
            stack.enter_context(patch.object(module, function, other))
        return Step(config_of(SIZES, LENGTH, {**SMALL, "attention.layout": "zigzag", **changes}), devices)


def figures(variant: Step) -> Row:
    """Figures per device, read off the program: collectives, bytes, memory; and the busiest device's attention."""
    found = contract.found(hlo.collectives(variant.program.as_text()), variant.mesh)
    lines = [
        {"place": line.place, "kind": line.kind, "axes": list(line.axes), "times": total.times, "bytes": total.bytes}
        for line, total in sorted(found.items())
        if line.kind != "scalars"
    ]
    return {
        "collectives": lines,
        "sent": sent(found, variant.mesh),
        "temporaries": variant.temporaries,
        "attention_operations": operations.attention(variant.model, variant.mesh),
    }


def timed(variants: dict[str, Step], rounds: int) -> dict[str, Row]:
    """Seconds of each variant, taking turns, and the losses of all steps."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            started = time.perf_counter()
            losses[name].append(variant())
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    for name, of_steps in losses.items():
        assert np.allclose(of_steps, losses["whole"], rtol=1e-5), f"{name} computes something else"

    def ratio(name: str) -> float:
        return statistics.median(one / whole for one, whole in zip(seconds[name], seconds["whole"], strict=True))

    return {name: {"seconds": seconds[name], "ratio": ratio(name), "losses": losses[name]} for name in variants}


def render(rows: list[Row]) -> str:
    """The table."""
    whole = rows[0]
    body = []
    for row in rows:
        body.append(
            (
                row["name"],
                sum(line["times"] for line in row["collectives"]),
                "; ".join(map(_in_words, row["collectives"])),
                f"{row['sent'] / 1e6:,.1f}",
                megabytes(row["temporaries"]),
                f"{row['attention_operations'] / whole['attention_operations']:.2f}",
                f"{row['ratio']:.2f}",
            )
        )
    head = "variant | collectives | kinds | sent, MB | temporaries | busiest device's attention | time / whole"
    return "\n".join(
        [
            "# What each idea is worth",
            "",
            "Command: `python -m experiments.paper.ablation`",
            "",
            f"A step of 4 layers of width 256, float32, {SEQUENCES} sequences of {LENGTH:,} tokens, on 2 x 4 simulated "
            "devices (data x seq). Compiled, except for the last two columns, which are counted and measured.",
            "",
            table(head, body),
        ]
    )


def _in_words(line: Row) -> str:
    return f"{line['times']} {line['kind']} over {' and '.join(line['axes'])} ({line['place']})"


def plot(rows: list[Row]) -> Figure:
    """Bars for each variant: its figures over those of the whole algorithm."""
    figure = Figure(figsize=(8, 3.5))
    axes = figure.subplots()
    keys = {
        "sent": "bytes sent",
        "temporaries": "temporaries",
        "attention_operations": "busiest device",
        "ratio": "time",
    }
    place = np.arange(len(rows))
    for number, (key, label) in enumerate(keys.items()):
        axes.bar(place + 0.2 * number - 0.3, [row[key] / rows[0][key] for row in rows], 0.2, label=label)
    axes.set_xticks(
        place, [row["name"].replace(" for ", "\nfor ").replace(" of ", "\nof ") for row in rows], fontsize=8
    )
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_ylabel("over the whole algorithm")
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant (default: 7)")
    arguments = parser.parse_args()
    distributed.start_on_cpu(8)
    devices = jax.devices()
    variants = {name: variant(name, devices) for name in VARIANTS}
    times = timed(variants, arguments.rounds)
    rows = [{"name": name, **figures(one), **times[name]} for name, one in variants.items()]
    write(NAME, rows, render, plot)


if __name__ == "__main__":
    main()
