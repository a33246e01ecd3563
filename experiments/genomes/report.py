"""The tables and the figure of this experiment."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.genomes.genomes import HELD_OUT
from experiments.tables import spread, table
from lss_jax.reports.figures import Curve, Plot, png_of

Found = dict[str, Any]  # results by the names of runs


def contexts_in(found: Found) -> list[int]:
    return sorted({int(match[1]) for name in found if (match := re.match(r"bases, context (\d+),", name))})


def seeds_of(found: Found, kind: str) -> list[Any]:
    return [result for name, result in found.items() if name.startswith(f"{kind}, seed")]


def base_rows(found: Found, baselines: Found) -> list[list[str]]:
    """Bits per base on each held-out genome: of the baselines, and of the models by context."""
    bits, sizes = baselines["k-mers"]["bits"], baselines["compressed"]
    rows = [[f"k-mers, order {order}", *(f"{bits[order][name]:.3f}" for name in HELD_OUT)] for order in bits]
    for program in ("gzip -9", "xz -9e", "xz -9e behind the training genomes"):
        rows.append([program, *(f"{sizes[name][program]:.3f}" for name in HELD_OUT)])
    for context in contexts_in(found):
        seeds = seeds_of(found, f"bases, context {context}")
        values = ([seed["genomes"][name]["bits_per_base"] for seed in seeds] for name in HELD_OUT)
        rows.append([f"model, context {context:,}", *(spread(of_name, 3) for of_name in values)])
    return rows


def bits_by_bin(found: Found, context: int, genome: str) -> dict[tuple[int, int], float]:
    """By how many bases came before, the mean of all seeds."""
    seeds = [seed["genomes"][genome]["bins"] for seed in seeds_of(found, f"bases, context {context}")]
    return {
        tuple(one[0]["before"]): statistics.mean(b["bits_per_base"] for b in one) for one in zip(*seeds, strict=True)
    }


def position_rows(found: Found, genome: str) -> list[list[str]]:
    columns = [bits_by_bin(found, context, genome) for context in contexts_in(found)]
    bins = sorted({one for column in columns for one in column})
    return [[f"{a:,} to {b:,}", *(f"{c[a, b]:.3f}" if (a, b) in c else "" for c in columns)] for a, b in bins]


def gene_rows(found: Found, baselines: Found) -> list[list[str]]:
    frames, seeds = baselines["open frames"], [seed["test"] for seed in seeds_of(found, "genes")]
    rows = [
        ["all bases called coding", f"{frames['all coding']['test']:.4f}"],
        [f"open reading frames of {frames['length']} bases or more", f"{frames['f1']['test']:.4f}"],
    ]
    return [*rows, ["model", spread([seed["dice_coding"] for seed in seeds], 4)]] if seeds else rows


def tables(found: Found, baselines: Found) -> str:
    contexts, lines = contexts_in(found), []
    head = [f"{name} ({kind})" for name, kind in HELD_OUT.items()]
    lines += [*table(["bits per base", *head], base_rows(found, baselines)), ""]
    for name in HELD_OUT if contexts else ():
        shown = [f"context {context:,}" for context in contexts]
        lines += [*table([f"{name}, by bases before", *shown], position_rows(found, name)), ""]
    return "\n".join([*lines, *table(["coding bases of held-out contigs", "F1"], gene_rows(found, baselines)), ""])


def figure(found: Found, genome: str) -> Plot:
    curves = []
    for style, context in enumerate(contexts_in(found)):
        bins = bits_by_bin(found, context, genome)
        curves.append(Curve(f"context {context:,}", [b for _, b in bins], list(bins.values()), style, dots=True))
    return Plot("bases before, at most", f"bits per base, {genome}", curves, log_x=True)


def write_report(found: Found, baselines: Found, out: Path, say: Callable[[str], None] = print) -> None:
    """Writes `results.md` and `by_position.png`, of the species that was not trained on."""
    (out / "results.md").write_text(tables(found, baselines))
    if contexts_in(found):
        (out / "by_position.png").write_bytes(png_of(figure(found, list(HELD_OUT)[-1])))
    say(tables(found, baselines))
