"""Load balance of masked attention over the devices, for both layouts.

    python -m experiments.balance.run

Counts, on each of N devices, the blocks that the blockwise kernel computes: pairs of a query block and a key block that
the mask does not mask out entirely. The kernel's own functions find them here, on the host, so no devices are needed. A
figure is the busiest device's count over the mean; 1 is even, and the time of a step grows with it. The sequence grows
with N: 1,024 tokens per device, in blocks of 128 queries and 128 keys, so `L = 1024 N`.

The masks: causal; and causal within packed documents, for a batch of 4 sequences with documents of their own, whose
lengths are drawn from an exponential distribution with a mean of L/8 (few and long) or of 1,024 tokens (many and
short). For documents the figures are the mean and the worst of 10 seeds.

Goal: zigzag at most 1.05 for a causal mask. Takes half a minute. Writes `results.json`, `results.md` and
`balance.png` beside this file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.balance.count import computed_blocks
from lss_jax.attention.mask import Intervals, causal, documents
from lss_jax.parallel.layout import Layout
from lss_jax.runtime import distributed

DEVICES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TOKENS = 1024  # per device
BLOCK = 128  # queries, and keys
ROWS = 4  # sequences in the batch, each with its own documents
SEEDS = 10
SHORT = 1024  # mean length of short documents
LAYOUTS = ("contiguous", "zigzag")
GOAL = 1.05  # for zigzag and a causal mask
HERE = Path(__file__).parent


def packed(length: int, mean: int, seed: int) -> Callable[[jax.Array], Intervals]:
    """Causal attention within documents of random lengths: intervals `[B, l]` for the positions `[l]`."""
    random = np.random.default_rng(seed)
    bounds_2BL = np.stack([document_bounds(length, mean, random) for _ in range(ROWS)], axis=1)
    return lambda position_l: documents(jnp.asarray(bounds_2BL[:, :, position_l])) & causal(jnp.asarray(position_l))


def document_bounds(length: int, mean: int, random: np.random.Generator) -> np.ndarray:
    """The start and the end of each token's document, `[2, L]`."""
    lengths = 1 + random.exponential(mean, size=20 * length // mean).astype(np.int32)
    ends = np.minimum(np.cumsum(lengths), length)
    assert ends[-1] == length
    ends = np.unique(ends)
    document_L = np.searchsorted(ends, np.arange(length), side="right")
    return np.stack((np.append(0, ends)[document_L], ends[document_L])).astype(np.int32)


def busiest_over_mean(mask: Callable[[jax.Array], Intervals], layout: Layout, length: int) -> float:
    count_N = computed_blocks(mask, layout, length, BLOCK, BLOCK)
    return float(count_N.max() / count_N.mean())


def measure(devices: int) -> dict:
    length = devices * TOKENS
    result: dict = {"devices": devices, "length": length}
    for name in LAYOUTS:
        layout = Layout(name, devices)
        result[name] = {"causal": busiest_over_mean(causal, layout, length)}
        for kind, mean in (("long documents", length // 8), ("short documents", SHORT)):
            ratios = [busiest_over_mean(packed(length, mean, seed), layout, length) for seed in range(SEEDS)]
            result[name][kind] = {"mean": float(np.mean(ratios)), "worst": max(ratios)}
    return result


def table(results: list[dict]) -> str:
    lines = [
        "| N | L | causal, contiguous | zigzag | long documents, contiguous | zigzag "
        "| short documents, contiguous | zigzag |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        cells = [f"{result[name]['causal']:.3f}" for name in LAYOUTS]
        for kind in ("long documents", "short documents"):
            cells += [f"{result[name][kind]['mean']:.2f} ({result[name][kind]['worst']:.2f})" for name in LAYOUTS]
        lines.append(f"| {result['devices']} | {result['length']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(results: list[dict]) -> str:
    worst = max(result["zigzag"]["causal"] for result in results)
    return (
        "Blocks computed by the busiest device over the mean; for documents the mean (and the worst) of "
        f"{SEEDS} seeds.\nGoal, zigzag at most {GOAL} for a causal mask: the worst is {worst:.3f}, "
        f"{'met' if worst <= GOAL else 'NOT met'}."
    )


def plot(results: list[dict]) -> None:
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    devices = [result["devices"] for result in results]
    for axis, kind in zip(axes, ("causal", "long documents", "short documents"), strict=True):
        for name, colour in zip(LAYOUTS, ("tab:orange", "tab:blue"), strict=True):
            ratios = [result[name][kind] for result in results]
            if kind == "causal":
                axis.plot(devices, ratios, "o-", color=colour, label=name, markersize=3)
            else:
                axis.plot(devices, [r["mean"] for r in ratios], "o-", color=colour, label=name, markersize=3)
                axis.plot(devices, [r["worst"] for r in ratios], ":", color=colour, label=f"{name}, worst seed")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("devices (1,024 tokens each)")
        axis.set_title(kind, fontsize=10)
        axis.axhline(1, color="grey", linewidth=0.5)
    axes[0].set_ylabel("busiest device over mean")
    axes[0].legend(*axes[1].get_legend_handles_labels(), fontsize=7, loc="upper left")  # where there is room
    figure.savefig(HERE / "balance.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES, help=f"sizes N (default: {DEVICES})")
    arguments = parser.parse_args()
    distributed.start()
    results = []
    for devices in arguments.devices:
        results.append(measure(devices))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results), verdict(results), sep="\n\n")
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results.md").write_text(f"{table(results)}\n\n{verdict(results)}\n")
    plot(results)


if __name__ == "__main__":
    main()
