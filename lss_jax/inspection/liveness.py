"""The memory of a traced step beside its arguments, counted: which arrays are live when, and how they are packed.

XLA's compiler for CPUs runs kernels in breadth-first order, so that whatever can start early does; from this order
follows when each array comes to life, and when it is read for the last time. Loops run their bodies once, in between:
stacked results live from the start of a loop, what a loop carries stays in its place, and is copied first if somebody
else still needs it. Arrays are then packed like XLA packs them, the largest first.

Two things are not known from the program: the order of equal arrays in the packing, for which a few orders are tried,
and what XLA adds besides (`experiments/planner` measures how close this comes).
"""

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lss_jax.inspection.dataflow import COLLECTIVES, VIEWS, Graph, Node, Value
from lss_jax.inspection.inlining import graph_of
from lss_jax.inspection.kernels import IN_PLACE, Kernels

# XLA on CPU computes bfloat16 in float32 up to jaxlib 0.11.1, and so stores it.
BFLOAT16_ON_CPU = 2 if jax.__version_info__ >= (0, 11, 2) else 4  # bytes
MOVED_ON_CPU = 4 if BFLOAT16_ON_CPU == 4 else 4 + 2  # collectives carry float32: as it arrived, and rounded

ORDERS = 8  # of equal arrays in the packing, beside those by start and by lifetime
NOISE = 0.1  # by which lifetimes differ between these orders


class Array(NamedTuple):
    """An array that is live at the peak."""

    bytes: int  # per device
    shape: tuple[int, ...]
    dtype: str
    made_by: str  # the operation and its scope


class Liveness(NamedTuple):
    """The memory of a step beside its arguments, in bytes per device."""

    device: int
    host: int
    largest: list[Array]  # live when the device needs most, the largest first


class Buffer:
    """A piece of memory, from the first to the last moment at which a kernel uses it."""

    def __init__(self, value: Value, maker: str, time: int, bytes: int):
        self.value, self.maker, self.bytes = value, maker, bytes
        self.start = self.end = time


def liveness(closed: core.ClosedJaxpr, shown: int = 20, *, on_cpu: bool = True) -> Liveness:
    """Counts the arrays of a traced, jitted function, without its arguments and what it returns in their place.

    On CPU there is one memory, and bfloat16 takes more of it.
    """
    graph, run = graph_of(closed), _Run(on_cpu)
    if on_cpu:
        graph.put_in_one_memory()
    run.graph(graph)
    returned = {run.held.get(run.kernels.base(value)) for value in graph.outputs}
    buffers = [buffer for buffer in run.buffers if buffer not in returned]
    on_device, on_host = ([b for b in buffers if b.value.on_host == host and b.bytes] for host in (False, True))
    largest = sorted(_live_at_peak(on_device), key=lambda buffer: -buffer.bytes)[:shown]
    arrays = [Array(b.bytes, b.value.shape, str(b.value.dtype), b.maker) for b in largest]
    return Liveness(packed(on_device), packed(on_host), arrays)


class _Run:
    """One pass over a program's kernels: the buffers that they use, and when."""

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self.time = 0
        self.buffers: list[Buffer] = []
        self.held: dict[Value, Buffer | None] = {}  # where each value is; None or missing: in an argument, or nowhere

    def graph(self, graph: Graph) -> None:
        """Runs the kernels of a program or of a body."""
        kernels = self.kernels = Kernels(graph)
        order, copies = scheduled(kernels)
        readers = defaultdict(list)
        for node in order:
            for value in kernels.reads[node]:
                readers[value].append(node)
        self.time += 1
        for node in order:
            self.time += 1
            if node.bodies:
                self._bodies(node, kernels, copies)
            elif node.operation != "result":
                self._hold(node, kernels, readers)
            for value in [*kernels.reads[node], *node.outputs]:
                self._use(value)
        self.time += 1
        self.kernels = kernels

    def _use(self, value: Value) -> None:
        buffer = self.held.get(value)
        if buffer:
            buffer.end = self.time

    def _bytes(self, value: Value) -> int:
        if value.dtype != jnp.bfloat16 or not self.on_cpu:
            return value.bytes
        moved = value.node is not None and value.node.operation in COLLECTIVES
        return value.elements * (MOVED_ON_CPU if moved else BFLOAT16_ON_CPU)

    def _new(self, value: Value, node: Node, what: str = "") -> Buffer:
        buffer = Buffer(value, f"{what or node.operation} in {node.scope}", self.time, self._bytes(value))
        self.buffers.append(buffer)
        return buffer

    def _hold(self, node: Node, kernels: Kernels, readers: dict[Value, list[Node]]) -> None:
        """Finds a place for the results of a kernel: new, or that of an operand that it reads last."""
        reads = kernels.reads[node]
        if node.operation in VIEWS:
            self.held[node.outputs[0]] = self.held.get(reads[0])
            return
        for value in node.outputs:
            if value not in kernels.in_memory and node.operation != "copy":
                continue
            over: Iterator[Value] = iter(())
            if node.operation in IN_PLACE:
                mine = kernels.own.union(kernels.graph.carried)
                over = (x for x in kernels.sources(node.inputs[0], fused=False) if x in mine)
            elif value is node.outputs[0]:
                over = (x for x in kernels.overwritable(node) if x in kernels.own and x in reads)
            size = self._bytes(value)
            free = (x for x in over if self.held.get(x) and readers[x][-1] is node and self._bytes(x) == size)
            place = next(free, None)
            self.held[value] = self.held[place] if place else self._new(value, node)

    def _bodies(self, node: Node, kernels: Kernels, copies: dict[tuple[Node, int], Value]) -> None:
        """Runs a loop's body, or the branches of a `cond` one after the other, which then share their memory."""
        for position, value in enumerate(node.outputs):
            place, what = None, "" if node.operation == "cond" else "stacked"
            if position < len(node.carried):
                sources, what = kernels.sources(node.carried[position], fused=False), "carried"
                initial = copies.get((node, position)) or (sources[0] if len(sources) == 1 else None)
                place = self.held.get(initial) if initial else None
            self.held[value] = place or self._new(value, node, what)
        for body in node.bodies:
            for carried, value in zip(body.carried, node.outputs, strict=False):
                self.held[carried] = self.held[value]
            self.graph(body)
        self.time += 1


def scheduled(kernels: Kernels) -> tuple[list[Node], dict[tuple[Node, int], Value]]:
    """The order of the kernels, with copies of what loops would overwrite: by loop and number of the carried value."""
    before = _ancestors(_breadth_first(kernels), kernels)
    readers = defaultdict(list)
    for node in before:
        for value in kernels.reads[node]:
            readers[kernels.base(value)].append(node)
    copies: dict[tuple[Node, int], Value] = {}

    def copy(value: Value, node: Node, position: int) -> None:
        like = node.outputs[position]
        result = Value(like.shape, like.dtype, like.on_host, shards=like.shards)
        result.node = Node("copy", {}, [value], node.scope, [result])
        kernels.add(result.node, [value])
        kernels.reads[node] = [*kernels.reads[node], result]
        copies[node, position] = result

    first: set[Value] = set()  # those that one of several unordered loops may overwrite
    mine = kernels.own | set(kernels.graph.carried)
    for node in [node for node in before if node.carried]:
        seen: set[Value] = set()
        for position, initial in enumerate(node.carried):
            sources = kernels.sources(initial, fused=False)
            if len(sources) != 1:
                continue
            value = kernels.base(sources[0])
            others = [other for other in readers[value] if other is not node and other not in before[node]]
            needed_later = any(node in before[other] for other in others)
            if not others and value not in seen and value in mine:
                pass
            elif value in mine and value not in seen | first and not needed_later:
                first.add(value)
            else:
                copy(sources[0], node, position)
            seen.add(value)
    _copy_carried(kernels, before, readers)
    return _breadth_first(kernels), copies


def _copy_carried(kernels: Kernels, before: dict[Node, set[Node]], readers: dict[Value, list[Node]]) -> None:
    """Copies what a turn of a loop finds, unless all who read it are done before its successor is computed."""
    results = [node for node in kernels.nodes if node.operation == "result"]
    for value, result in zip(kernels.graph.carried, results, strict=False):
        if kernels.reads[result] == [value]:
            continue
        late = [node for node in readers[value] if node is not result and node not in before[result]]
        if late:
            moved = Value(value.shape, value.dtype, value.on_host)
            moved.node = Node("copy", {}, [value], "carried", [moved])
            for node in readers[value]:
                kernels.reads[node] = [moved if x is value else x for x in kernels.reads[node]]
            kernels.add(moved.node, [value])


def _breadth_first(kernels: Kernels) -> list[Node]:
    """The order in which XLA's scheduler for CPUs visits kernels: each as soon as its operands are there, first come.

    Of the readers of a fused kernel the last in the program comes first, since fusion goes through it from the end.
    """
    producers = {value: node for node in kernels.nodes for value in node.outputs}
    missing, users = {}, defaultdict(list)
    for node in kernels.nodes:
        needed = dict.fromkeys(producers[value] for value in kernels.reads[node] if value in producers)
        missing[node] = len(needed)
        for producer in needed:
            users[producer].append(node)
    queue, order = deque(node for node in kernels.nodes if not missing[node]), []
    while queue:
        order.append(node := queue.popleft())
        for user in reversed(users[node]) if node.fusible else users[node]:
            missing[user] -= 1
            if not missing[user]:
                queue.append(user)
    assert len(order) == len(kernels.nodes), "a kernel waits for itself"
    return order


def _ancestors(order: list[Node], kernels: Kernels) -> dict[Node, set[Node]]:
    """The kernels whose results each kernel needs, at one remove or more."""
    producers = {value: node for node in order for value in node.outputs}
    before: dict[Node, set[Node]] = {}
    for node in order:
        direct = {producers[value] for value in kernels.reads[node] if value in producers}
        before[node] = direct.union(*(before[producer] for producer in direct))
    return before


def _live_at_peak(buffers: list[Buffer]) -> list[Buffer]:
    """The buffers that are live when their sum is largest."""
    changes: dict[int, int] = defaultdict(int)
    for buffer in buffers:
        changes[buffer.start] += buffer.bytes
        changes[buffer.end + 1] -= buffer.bytes
    total, peak, at = 0, 0, 0
    for time in sorted(changes):
        total += changes[time]
        if total > peak:
            peak, at = total, time
    return [buffer for buffer in buffers if buffer.start <= at <= buffer.end]


def packed(buffers: list[Buffer]) -> int:
    """Bytes that the buffers take, packed like XLA does it: the largest first, of equal ones the longest-lived.

    Small differences in lifetimes decide what fits into which gap, and ours are not exactly XLA's. So equal buffers are
    also taken by their start, and by lifetimes that differ a little from ours; the worst counts.
    """
    draw, sizes = random.Random(0), [_packed(buffers, lambda b: b.start), _packed(buffers, lambda b: b.start - b.end)]
    for _ in range(ORDERS):
        noise = {buffer: draw.uniform(1 - NOISE, 1 + NOISE) for buffer in buffers}
        sizes.append(_packed(buffers, _by_lifetime(noise)))
    return max(sizes)


def _by_lifetime(noise: dict[Buffer, float]) -> Callable[[Buffer], float]:
    return lambda buffer: -(buffer.end - buffer.start + 1) * noise[buffer]


def _packed(buffers: list[Buffer], order: Callable[[Buffer], Any]) -> int:
    """Best fit: each buffer goes into the smallest gap that is free all its life."""
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, order(b))):
        taken = sorted((at, at + b.bytes) for at, b in placed if b.start <= buffer.end and buffer.start <= b.end)
        end, gaps = 0, []
        for first, last in taken:
            if first - end >= buffer.bytes:
                gaps.append((first - end, end))
            end = max(end, last)
        placed.append((min(gaps)[1] if gaps else end, buffer))
    return max((at + buffer.bytes for at, buffer in placed), default=0)
