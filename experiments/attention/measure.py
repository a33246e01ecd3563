"""The four measurements of the attention benchmark; each gives the rows of one table, as `results.json` has them."""

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

from experiments.attention.programs import Halves, Program, ratio, take_turns
from experiments.attention.variants import (
    BLOCK_KEYS,
    BLOCK_QUERIES,
    DEVICES,
    LSS_ZIGZAG,
    PARTITIONER,
    VARIANTS,
    Variant,
    attention_of,
    must_exist,
    predicted,
)
from experiments.balance.count import all_blocks, computed_blocks
from lss_jax.attention.mask import Intervals, bidirectional, causal, window
from lss_jax.parallel.layout import Layout

BLOCK_SIZES = (128, 256, 512, 1024)
WINDOWS = 16  # per sequence
GOAL_AREA = {"bidirectional": 1.0, "causal": 0.55, "window": 0.15}  # time over that of the bidirectional mask


def compare(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    """The variants side by side; a variant too long to run has its memory and collectives, but no seconds."""
    programs = {variant: Program(attention_of(variant, length, mesh), length, mesh) for variant in VARIANTS}
    for variant, program in programs.items():
        if variant != PARTITIONER:
            check(f"{variant.name} at {length}", program.traffic(), predicted(variant, length))
    fitting = {variant: program for variant, program in programs.items() if length <= variant.longest}
    seconds = take_turns(fitting, rounds)
    return [
        {
            "length": length,
            "variant": variant.name,
            **_times(variant, seconds),
            "temporary_bytes": program.temporary,
            "temporary_over_partitioner": program.temporary / programs[PARTITIONER].temporary,
            "temporary_over_must_exist": program.temporary / must_exist(variant, length),
            "total_over_must_exist": program.total / must_exist(variant, length),
            "collectives": [
                {"kind": kind, "bytes": size, "times": times} for (kind, size), times in program.traffic().items()
            ],
            "as_predicted": None if variant == PARTITIONER else True,  # `check` has stopped the run otherwise
        }
        for variant, program in programs.items()
    ]


def check(what: str, found: Counter, expected: Counter) -> None:
    """Stops the run where the compiled collectives are not the predicted ones."""
    assert found == expected, f"{what}: {found} in the program, predicted {expected}"


def _times(variant: Variant, seconds: dict[Variant, list[float]]) -> dict[str, float | None]:
    took, base = seconds.get(variant), seconds.get(PARTITIONER)
    return {
        "seconds": statistics.median(took) if took else None,
        "over_partitioner": ratio(took, base) if took and base else None,
        "over_lss_zigzag": ratio(took, seconds[LSS_ZIGZAG]) if took else None,
    }


def area(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    """Time against the area of the mask."""
    masks: dict[str, Callable[[jax.Array], Intervals]] = {
        "bidirectional": partial(bidirectional, length=length),
        "causal": causal,
        "window": lambda position_l: causal(position_l) & window(position_l, length // WINDOWS),
    }
    layout = Layout(LSS_ZIGZAG.layout, DEVICES)
    programs = {
        name: Program(attention_of(LSS_ZIGZAG, length, mesh, mask), length, mesh) for name, mask in masks.items()
    }
    seconds = take_turns(programs, rounds)
    everything = all_blocks(layout, length, BLOCK_QUERIES, BLOCK_KEYS)
    return [
        {
            "length": length,
            "mask": name,
            "seconds": statistics.median(seconds[name]),
            "over_bidirectional": ratio(seconds[name], seconds["bidirectional"]),
            "blocks": int(computed_blocks(mask, layout, length, BLOCK_QUERIES, BLOCK_KEYS).sum()) / everything,
            "goal": GOAL_AREA[name],
        }
        for name, mask in masks.items()
    ]


def tune(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    """LSS zigzag with blocks of every size up to a chunk of the layout, which bounds a block above."""
    chunk = length // DEVICES // Layout(LSS_ZIGZAG.layout, DEVICES).chunks_per_device
    sizes = [size for size in BLOCK_SIZES if size <= chunk]
    default = (min(BLOCK_QUERIES, chunk), min(BLOCK_KEYS, chunk))
    programs = {
        blocks: Program(attention_of(LSS_ZIGZAG, length, mesh, blocks=blocks), length, mesh)
        for blocks in dict.fromkeys([default, *((queries, keys) for queries in sizes for keys in sizes)])
    }
    seconds = take_turns(programs, rounds)
    return [
        {
            "length": length,
            "queries": blocks[0],
            "keys": blocks[1],
            "over_default": ratio(seconds[blocks], seconds[default]),
            "temporary_bytes": program.temporary,
        }
        for blocks, program in sorted(programs.items())
    ]


def regather(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    """LSS zigzag with the gathered pair saved for the backward pass, and with it gathered again there."""
    variants = {"gathered pair saved": LSS_ZIGZAG, "re-gathered": LSS_ZIGZAG._replace(regather=True)}
    programs = {name: Halves(attention_of(variant, length, mesh), length, mesh) for name, variant in variants.items()}
    seconds = take_turns(programs, rounds)
    rows = []
    for name, program in programs.items():
        found = program.traffic()
        check(name, found, predicted(variants[name], length))
        rows.append(
            {
                "length": length,
                "variant": name,
                "seconds": statistics.median(seconds[name]),
                "over_kept": ratio(seconds[name], seconds["gathered pair saved"]),
                "saved_bytes": program.saved_bytes(),
                "all_gathers": sum(times for (kind, _), times in found.items() if kind == "all-gather"),
            }
        )
    return rows
