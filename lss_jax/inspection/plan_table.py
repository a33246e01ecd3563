"""A plan as a table for a terminal, and as JSON for programs."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lss_jax.config.schema import Config
from lss_jax.config.units import shown_size
from lss_jax.inspection.planner import CLOSE, Candidate, Cost, Impossible
from lss_jax.inspection.room import Changes

SHOWN = 20  # candidates in the table


def table_of(candidates: list[Candidate], impossible: list[Impossible], config: Config, memory: int) -> str:
    """The candidates (the best first) beside the `memory` of a device in bytes, what is impossible, and the choice."""
    own, best = config.data.seq_len, candidates[0]
    head = ("data x seq x model", "attention", "longest", "sent per step", f"at {own:,}: memory", "sent per step")
    rows = [head] + [_row(candidate, memory) for candidate in candidates[:SHOWN]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(candidates) > SHOWN:
        lines.append(f"... and {len(candidates) - SHOWN} more (--json has all)")
    lines += ["", "Per device: memory by the model of lss_jax/inspection/memory.py; bytes sent by ring algorithms."]
    if impossible:
        lines += ["", "not possible:", *(f"  {line}" for line in by_rule(impossible))]
    longest = max(candidate.longest.seq_len for candidate in candidates)
    close = sum(candidate.longest.seq_len >= (1 - CLOSE) * longest for candidate in candidates)
    among = (
        f"of the {close} within {CLOSE:.0%} of the longest, it sends least per token" if close > 1 else "the longest"
    )
    lines += ["", f"recommended: {_mesh(best.sizes)}, {best.strategy}, {best.longest.seq_len:,} tokens: {among}."]
    return "\n".join(lines)


def line_of(step: tuple[Changes, int]) -> str:
    """One thing that makes room, and the longest sequence with it and all before it."""
    changes, length = step
    what = " ".join(f"{key}={value}" for key, value in changes.items()) or "the config as it is"
    return f"  {f'{length:,} tokens' if length else 'does not fit':>20}  {what}"


def _row(candidate: Candidate, memory: int) -> tuple[str, ...]:
    own = candidate.own.memory.total
    return (
        _mesh(candidate.sizes),
        candidate.strategy,
        f"{candidate.longest.seq_len:,}",
        shown_size(candidate.longest.sent),
        shown_size(own) + (" (too much)" if own > memory else ""),
        shown_size(candidate.own.sent),
    )


def _mesh(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def by_rule(impossible: list[Impossible]) -> list[str]:
    """One line per rule, without the sizes of the mesh, with two of the meshes that it forbids."""
    forbidden = defaultdict(list)
    for sizes, strategy, reason in impossible:
        forbidden[re.sub(r"(mesh\.\w+)=\d+", r"\1", reason)].append(f"{_mesh(sizes)} {strategy}")
    return [
        f"{rule}: {', '.join(meshes[:2])}{f' and {len(meshes) - 2} more' if len(meshes) > 2 else ''}"
        for rule, meshes in forbidden.items()
    ]


def json_of(candidates: list[Candidate], impossible: list[Impossible]) -> dict[str, Any]:
    """The whole plan, sizes in bytes."""

    def cost(one: Cost) -> dict[str, Any]:
        return {**one._asdict(), "memory": {**one.memory._asdict(), "total": one.memory.total}}

    return {
        "candidates": [{**one._asdict(), "own": cost(one.own), "longest": cost(one.longest)} for one in candidates],
        "impossible": [one._asdict() for one in impossible],
    }
