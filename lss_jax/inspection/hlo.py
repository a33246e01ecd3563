"""Reads the collectives out of a compiled program's text, with the trip counts of the loops around them.

XLA writes a collective in several forms, each of which counts as one: a plain instruction; a start and a done, between
which other work may run; a fusion; and on TPUs a reduce-scatter as an all-reduce of which each device takes a slice.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from lss_jax.parallel.scopes import BY_PASS, ELSEWHERE, PLACES

PLACE = re.compile(rf"\b({'|'.join(PLACES)})\b")

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>.*?) (?P<op>[\w-]+)\((?P<operands>.*)$")
COLLECTIVE = re.compile(rf"(?P<kind>{KINDS})(?P<part>-start|-done)?$")
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONDITION = re.compile(r"condition=%([\w.-]+)")
BELOW = re.compile(r"compare\(.*%(?P<limit>constant[\w.-]*)\), direction=LT")
TILES = ":T("  # only TPU programs have tiled layouts
SHAPE = re.compile(r"(?:f|bf|s|u)(\d+)\[([\d,]*)\]")
SOURCE = re.compile(r'op_name="([^"]*)"')
NEAR = 30  # instructions to search for a lost name
CONSTANT = re.compile(r"(\d+)\)")
NAME = re.compile(r"%([\w.-]+)")


class Collective(NamedTuple):
    """One collective; sizes are those of its result, per device."""

    kind: str
    elements: int
    bytes: int
    group: tuple[int, ...]  # the devices of its first group; of a permutation, one sender and its receiver
    times: int  # per run of the program
    asynchronous: bool  # may overlap with other work
    source: str  # its path of named scopes in the program

    @property
    def place(self) -> str:
        """The part of the step that it belongs to; in attention, regions and of weights also which pass."""
        places = PLACE.findall(self.source)
        if not places:
            return ELSEWHERE
        if places[-1] not in BY_PASS:
            return places[-1]
        return places[-1] + (" backward" if "transpose(" in self.source else " forward")

    @property
    def group_size(self) -> int:
        """The number of devices in a group."""
        return len(self.group)

    def axes(self, mesh_shape: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes along which it moves data."""
        coordinates = np.array(np.unravel_index(self.group, tuple(mesh_shape.values())))
        return tuple(name for name, along in zip(mesh_shape, coordinates, strict=True) if len(set(along.tolist())) > 1)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: str  # and all that follows them
    line: str

    @property
    def arguments(self) -> list[str]:
        """The names of its operands."""
        return NAME.findall(self.operands.split(")")[0])


Computation = dict[str, Instruction]  # by name


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`)."""
    computations, entry = _computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int | None, caller: Instruction | None) -> None:
        body = computations[name]
        for instruction in body.values():
            form = COLLECTIVE.match(instruction.op)
            if form and form["part"] != "-done":
                assert times is not None, f"a collective in a loop of unknown length: {instruction.line[:200]}"
                for part in _parts(instruction, body, computations):
                    found.append(_collective(form, part, body, times, caller, computations))
            inside = times
            if instruction.op == "while":
                trips = _trips(instruction, body, computations)
                inside = None if times is None or trips is None else times * trips
            line = instruction.line
            for called in CALLED.findall(line) + [n for b in BRANCHES.findall(line) for n in NAME.findall(b)]:
                visit(called, inside, instruction)

    visit(entry, 1, None)
    return found


def _parts(instruction: Instruction, body: Computation, computations: dict[str, Computation]) -> list[Instruction]:
    """The instruction; of several all-reduces that a compiler for TPUs combined, those of slices apart from the others.

    Each part is the instruction with the results that belong to it.
    """
    if instruction.op != "all-reduce" or not instruction.type.startswith("(") or TILES not in instruction.type:
        return [instruction]
    results = [user for user in _users(instruction, body) if user.op == "get-tuple-element"]
    sliced = [result for result in results if _slices(result, body, computations)]
    others = [result for result in results if result not in sliced]
    found = []
    for part in filter(None, (sliced, others)):
        types = [one for result in part for one in _slices(result, body, computations) or [result]]
        kind = "reduce-scatter" if part is sliced else "all-reduce"
        found.append(instruction._replace(op=kind, type=f"({', '.join(one.type for one in types)})"))
    return found


def _collective(
    form: re.Match,
    instruction: Instruction,
    body: Computation,
    times: int,
    caller: Instruction | None,
    computations: dict[str, Computation],
) -> Collective:
    """The collective of an instruction of this computation, which `caller` calls."""
    started, kind = form["part"] == "-start", form["kind"] if form["part"] else instruction.op
    users = _users(instruction, body)
    done = [user for user in users if started and user.op.endswith("-done")]
    for_tpu = TILES in instruction.type  # elsewhere a sum of which one takes a slice is a sum
    one_result = not instruction.type.startswith("(")
    slices = _slices(instruction, body, computations) if kind == "all-reduce" and for_tpu and one_result else None
    (result,) = done or [instruction]
    parts = [(int(bits), math.prod(map(int, filter(None, s.split(","))))) for bits, s in SHAPE.findall(result.type)]
    group = _group(instruction.line)
    shares = len(group) if slices else 1  # a share may be taken in several slices, and by several readers
    return Collective(
        kind="reduce-scatter" if slices else kind,
        elements=sum(count for _, count in parts) // shares,
        bytes=sum(bits // 8 * count for bits, count in parts) // shares,
        group=group,
        times=times,
        asynchronous=(started and '"is_sync":true' not in instruction.line)
        or "async_collective_name" in instruction.line,
        source=_source(instruction, body, caller),
    )


def _source(instruction: Instruction, body: Computation, caller: Instruction | None) -> str:
    """An instruction's path of named scopes; if the compiler lost it, that of the nearest one with a known place."""
    own = SOURCE.search(instruction.line)
    if own:
        return own[1]
    near = {one.name: one for one in (instruction, caller) if one}
    for number in range(NEAR):
        if number == len(near):
            break
        one = list(near.values())[number]
        source = SOURCE.search(one.line)
        if source and PLACE.search(source[1]):
            return source[1]
        near |= {x.name: x for x in (*_users(one, body), *(body[name] for name in one.arguments if name in body))}
    return ""


def _slices(
    instruction: Instruction, body: Computation, computations: dict[str, Computation]
) -> list[Instruction] | None:
    """The slices taken of a result, also inside fusions; None if there are none or anything else reads it."""
    found: list[Instruction] = []
    for user in _users(instruction, body):
        if user.op == "dynamic-slice":
            found.append(user)
            continue
        inside: list[Instruction] | None = None
        if user.op == "bitcast":
            inside = _slices(user, body, computations)
        elif user.op == "fusion":
            called = CALLED.search(user.line)
            assert called, f"a fusion that calls nothing: {user.line[:200]}"
            fused = computations[called[1]]
            number = f"{user.arguments.index(instruction.name)})"
            parameter = next(x for x in fused.values() if x.op == "parameter" and x.operands.startswith(number))
            inside = _slices(parameter, fused, computations)
        if inside is None:
            return None
        found += inside
    return found or None


def _users(instruction: Instruction, body: Computation) -> list[Instruction]:
    return [x for x in body.values() if instruction.name in x.arguments]


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    """The instructions of every computation by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    for line in text.splitlines():
        head, instruction = COMPUTATION.match(line), INSTRUCTION.match(line)
        if head:
            current = head["name"]
            computations[current] = {}
            entry = current if head["entry"] else entry
        elif instruction and current:
            computations[current][instruction["name"]] = Instruction(**instruction.groupdict(), line=line)
    return computations, entry


def _trips(loop: Instruction, body: Computation, computations: dict[str, Computation]) -> int | None:
    """The trip count of a loop of this computation, None if it depends on the data; loops count upwards by one."""
    known = TRIPS.search(loop.line)
    if known:
        return int(known[1])
    condition = CONDITION.search(loop.line)
    assert condition, f"a loop without a condition: {loop.line[:200]}"
    instructions = computations[condition[1]]
    limits = [BELOW.search(x.line) for x in instructions.values() if x.op == "compare"]
    if len(limits) != 1 or not limits[0]:
        return None
    limit = CONSTANT.match(instructions[limits[0]["limit"]].operands)
    (compared,) = (x for x in instructions.values() if x.op == "compare")
    counter = re.search(r"index=(\d+)", instructions[compared.arguments[0]].line)
    return int(limit[1]) - _start(loop, body, int(counter[1])) if limit and counter else None


def _start(loop: Instruction, body: Computation, counter: int) -> int:
    """The number from which a loop counts: zero, unless XLA has taken the first trips out of it."""
    initial = body.get(loop.arguments[0])
    start = body.get(initial.arguments[counter]) if initial and initial.op == "tuple" else None
    while start and start.op == "copy":
        start = body.get(start.arguments[0])
    constant = start and start.op == "constant" and CONSTANT.match(start.operands)
    return int(constant[1]) if constant else 0


def _group(line: str) -> tuple[int, ...]:
    """The devices of the first group, in the order of the mesh."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        moves = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)", pairs[0])]
        return next((move for move in moves if move[0] != move[1]), moves[0])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[.*?\)?)\))? \{([^}]*)\}", line)
    if by_axis:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", by_axis[1])}
        devices = _iota(by_axis[2] or str(list(sizes.values())).replace(" ", "")).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in re.findall(r"'(\w+)'", by_axis[3]) else 0 for name in sizes)
        return tuple(devices[first].ravel().tolist())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    assert iota, f"unknown form of replica groups: {line[:300]}"
    return tuple(_iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())


def _iota(written: str) -> np.ndarray:
    """The device numbers that XLA writes as `[24,144]T(1,0)`: an `arange`, reshaped, transposed and flattened."""
    shape, _, order = written.partition("T")
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (numbers.transpose(_ints(order)) if order else numbers).ravel()


def _ints(written: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", written)]
