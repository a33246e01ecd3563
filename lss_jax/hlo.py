"""Reads the collectives out of a compiled program's text, with the trip counts of the loops they stand in.

It knows the synchronous forms, as XLA writes them for CPU.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
OP = re.compile(rf" = (?P<type>.*?) (?P<kind>{KINDS})\(")
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SHAPE = re.compile(r"(?:f|bf|s|u)(\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective instruction; sizes are those of its result on one device."""

    kind: str
    elements: int
    bytes: int
    group_size: int  # devices that take part; of a permutation, how many send
    times: int  # per run of the program


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`)."""
    bodies, entry = _computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int | None) -> None:
        for line in bodies[name]:
            op = OP.search(line)
            if op:
                assert times is not None, f"a collective in a loop of unknown length: {line[:200]}"
                parts = [
                    (int(bits), math.prod(map(int, filter(None, s.split(",")))))
                    for bits, s in SHAPE.findall(op["type"])
                ]
                elements, size = sum(count for _, count in parts), sum(bits // 8 * count for bits, count in parts)
                found.append(Collective(op["kind"], elements, size, _group_size(line), times))
            trips = TRIPS.search(line)
            repeats = None if " while(" in line and not trips else int(trips[1]) if trips else 1
            inside = None if times is None or repeats is None else times * repeats
            for called in CALLED.findall(line) + [n.strip(" %") for b in BRANCHES.findall(line) for n in b.split(",")]:
                visit(called, inside)

    visit(entry, 1)
    return found


def counts(found: list[Collective]) -> Counter:
    """How often each kind runs; all-reduces of a few scalars under a name of their own."""
    total: Counter = Counter()
    for one in found:
        small = one.kind == "all-reduce" and one.elements <= 2
        total["scalar all-reduce" if small else one.kind] += one.times
    return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            current = head["name"]
            bodies[current] = []
            entry = current if head["entry"] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _group_size(line: str) -> int:
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return pairs[1].count("{")
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return listed[1].count(",") + 1
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if by_axis:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axis[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", by_axis[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    assert iota, f"unknown form of replica groups: {line[:300]}"
    return int(iota[2])
