"""Reads the collectives out of a compiled program's text, with the trip counts of the loops they stand in."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
OP = re.compile(rf" = (?P<type>.*?) (?P<kind>{KINDS})(?:-start)?\(")
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SHAPE = re.compile(r"(?:f|bf|s|u)\d+\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    elements: int  # of the result, per device
    group_size: int
    times: int  # per run of the program


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`)."""
    bodies, entry = _computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            op = OP.search(line)
            if op:
                elements = sum(math.prod(map(int, filter(None, s.split(",")))) for s in SHAPE.findall(op["type"]))
                found.append(Collective(op["kind"], elements, _group_size(line), times))
            is_loop = " while(" in line
            assert not is_loop or TRIPS.search(line), f"a loop of unknown length: {line[:200]}"
            repeats = int(TRIPS.search(line)[1]) if is_loop else 1
            for called in CALLED.findall(line) + [n.strip(" %") for b in BRANCHES.findall(line) for n in b.split(",")]:
                visit(called, times * repeats)

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
