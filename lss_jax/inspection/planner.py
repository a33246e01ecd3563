"""The longest sequence that fits on each mesh with each strategy, and the bytes that a step of it sends."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from lss_jax.attention.strategies import STRATEGIES, with_strategy
from lss_jax.config.rules import MeshSizes
from lss_jax.config.schema import Config, ConfigError, MeshConfig
from lss_jax.config.units import shown_size
from lss_jax.inspection.contract import predicted, sent
from lss_jax.inspection.memory import Memory, memory_of
from lss_jax.inspection.room import Changes, changed, fewer_inputs, state_on_host, ways
from lss_jax.models import Model, build_model
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import abstract_mesh, make_mesh
from lss_jax.training.setup import validate
from lss_jax.training.step import trace_train_step

TILE = 128  # lengths are multiples of this, and of the number of segments (or chunks) that the mesh makes of them
LONGEST = 2**31 - 1  # positions are int32
EXACT = 0.005  # the longest length is found to within this fraction
NEARLY_ALL = 0.9  # of a device's memory: used to less, it is the host's that ends a sequence
MUCH = 0.1  # of a device's memory: a larger state may be better off in the host's
CLOSE = 0.05  # lengths within this fraction of the longest count as equal, and traffic decides


class Cost(NamedTuple):
    """Costs of a training step at one length, in bytes per device."""

    seq_len: int
    memory: Memory
    sent: float


class Candidate(NamedTuple):
    """A mesh with a strategy, and its costs."""

    sizes: MeshSizes
    strategy: str
    changes: Changes  # to the config, which make room
    own: Cost  # at the config's length, whether it fits or not
    longest: Cost  # at the longest that fits


class Impossible(NamedTuple):
    """A mesh with a strategy that a rule or the memory forbids."""

    sizes: MeshSizes
    strategy: str
    reason: str


class Room(NamedTuple):
    """The bytes that there are for each device."""

    memory: int
    host: int | None  # in the host's memory; None: the config is planned as it is


def plan(config: Config, devices: int, room: Room) -> tuple[list[Candidate], list[Impossible]]:
    """All candidates, the best first, and what is impossible.

    With host memory to use each candidate has what makes the most room; `steps` says what that buys.

    Raises:
      ConfigError: the config is wrong on any mesh.
    """
    validate(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1, "none")), 1)
    candidates, impossible = [], []
    alike = [config.attention.strategy]  # what is not exact is another model, and takes no other strategy's place
    if STRATEGIES[config.attention.strategy].exact:
        alike = [name for name, strategy in STRATEGIES.items() if strategy.exact]
    for sizes in meshes(devices):
        for strategy in alike if sizes[1] > 1 else [config.attention.strategy]:  # on one device they are the same
            try:
                candidates.append(roomiest(config, sizes, strategy, room))
            except ConfigError as error:
                impossible.append(Impossible(sizes, strategy, str(error).split("\n")[0].split(";")[0]))
    return ranked(candidates), impossible


def meshes(devices: int) -> Iterator[MeshSizes]:
    """Yields all sizes (data, seq, model) whose product is `devices`."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data in divisors:
        yield from ((data, seq, devices // data // seq) for seq in divisors if devices // data % seq == 0)


def roomiest(config: Config, sizes: MeshSizes, strategy: str, room: Room) -> Candidate:
    """Costs with all that makes room, where there is host memory to use; of every layer's input as many wait as fit.

    The state goes to the host too, where it would take much of the devices, if that makes the sequence longer.

    Raises:
      ConfigError: as `evaluate`.
    """
    if room.host is None:
        return evaluate(config, sizes, strategy, room)
    planned = with_mesh(config, sizes, strategy)
    changes = {key: value for way in ways(planned, sizes) for key, value in way.items()}
    found: list[Candidate] = []
    problem: ConfigError | None = None
    for more in ({}, *state_on_host(planned)):
        if found and _state(found[0]) < MUCH * room.memory:
            break
        try:
            found.append(with_inputs(config, sizes, strategy, room, {**changes, **more}))
        except ConfigError as error:
            problem = problem or error
    if not found:
        assert problem
        raise problem
    return functools.reduce(_longer, found)


def with_inputs(config: Config, sizes: MeshSizes, strategy: str, room: Room, changes: Changes) -> Candidate:
    """Costs with these changes, and with fewer layers' inputs in host memory where that makes the sequence longer.

    Raises:
      ConfigError: as `evaluate`.
    """
    best = evaluate(config, sizes, strategy, room, changes)
    for fewer in fewer_inputs(changed(with_mesh(config, sizes, strategy), changes)):
        if best.longest.memory.total > NEARLY_ALL * room.memory:  # the device's memory is what ends it
            break
        best = _longer(best, evaluate(config, sizes, strategy, room, {**changes, **fewer}))
    return best


def _state(candidate: Candidate) -> int:
    return candidate.own.memory.parameters + candidate.own.memory.moments


def steps(config: Config, best: Candidate, room: Room) -> Iterator[tuple[Changes, int]]:
    """Yields what makes room on the recommended mesh, one thing after the other, and the longest sequence then.

    The length is 0 where not even the shortest sequence fits.
    """
    planned = with_mesh(config, best.sizes, best.strategy)
    so_far: Changes = {}
    last: list[Changes] = [
        {key: best.changes[key]} for key in ("optim.offload", "model.remat_every") if key in best.changes
    ]
    for way in ({}, *ways(planned, best.sizes), *last):
        so_far |= way
        try:
            length = evaluate(config, best.sizes, best.strategy, room, so_far).longest.seq_len
        except ConfigError:
            length = 0
        yield way, length


def _longer(one: Candidate, other: Candidate) -> Candidate:
    """The other, which costs more time, if its sequence is longer by more than what counts as equal."""
    return other if other.longest.seq_len > (1 + CLOSE) * one.longest.seq_len else one


def evaluate(config: Config, sizes: MeshSizes, strategy: str, room: Room, changes: Changes | None = None) -> Candidate:
    """Costs on this mesh with this strategy, at the config's length and at the longest that fits.

    Raises:
      ConfigError: it breaks a rule of the config, or not even the shortest sequence fits.
    """
    changes, mesh = changes or {}, abstract_mesh(sizes)
    config = changed(with_mesh(config, sizes, strategy), changes)
    validate(config, math.prod(sizes))

    def at(seq_len: int) -> Model:
        return build_model(at_length(config, seq_len), mesh)

    @functools.cache
    def memory_at(seq_len: int) -> Memory:
        return memory_of(at(seq_len), mesh)

    def cost(seq_len: int) -> Cost:
        return Cost(seq_len, memory_at(seq_len), sent(predicted(at(seq_len), mesh), mesh))

    def needs(seq_len: int) -> int:
        """Bytes of the device's memory, or as large a part of it as the host's is used to."""
        memory = memory_at(seq_len)
        of_host = math.ceil(memory.host / room.host * room.memory) if room.host else 0
        return max(memory.total, of_host)

    step = math.lcm(layout_on(config, mesh).padded(1) * max(config.model.patch, 1), TILE)
    first = max(1, config.data.seq_len // step)
    tiles = largest(lambda count: needs(count * step), room.memory, LONGEST // step, first)
    if not tiles:
        needed = shown_size(memory_at(step).total)
        raise ConfigError(
            f"{step:,} tokens need {needed}, more than --memory={shown_size(room.memory)}; use more devices"
        )
    longest = tiles * step
    validate(at_length(config, longest), math.prod(sizes))
    return Candidate(sizes, strategy, changes, cost(config.data.seq_len), cost(longest))


def with_mesh(config: Config, sizes: MeshSizes, strategy: str) -> Config:
    """The config on this mesh with this strategy, without the options of another strategy."""
    return dataclasses.replace(
        config, mesh=MeshConfig(*sizes, config.mesh.shard), attention=with_strategy(config.attention, strategy)
    )


def at_length(config: Config, seq_len: int) -> Config:
    """The config with another sequence length, and that of a source in proportion."""
    source_len = max(1, round(config.data.source_len * seq_len / config.data.seq_len))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len, source_len=source_len))


class Need(NamedTuple):
    """What a number needs."""

    number: int
    needed: int


def largest(needs: Callable[[int], int], room: int, limit: int, first: int) -> int:
    """The largest number up to `limit` that needs no more than `room`, 0 if there is none, to within `EXACT`.

    Needs should grow, in straight pieces that get steeper. Then a few evaluations do, from `first` on: the line through
    two numbers that fit meets the room at the largest or beyond it, and the line from a number that fits to one that
    does not at the largest or before it.
    """
    below: Need | None = None
    low, high = Need(0, 0), Need(limit + 1, 0)  # fits; does not, and may need nobody knows what
    guess, turn = min(max(first, 1), limit), 0
    while True:
        tried, turn = Need(guess, needs(guess)), turn + 1
        if tried.needed <= room:
            below, low = low if low.number else None, tried
        else:
            high = tried
        apart = max(1, int(EXACT * low.number))
        if high.number - low.number <= apart:
            return low.number
        if not low.number:
            guess = high.number // 4
        elif high.needed and (turn % 2 or not below):
            guess = _meets(low, high, room)
        else:
            guess = _meets(below, low, room) if below else 2 * low.number
        guess = max(1, min(max(guess, low.number + apart), high.number - apart))


def _meets(one: Need, other: Need, room: int) -> int:
    """Where the line through two points meets the room, rounded down; far away if it does not rise."""
    rise = other.needed - one.needed
    return one.number + (room - one.needed) * (other.number - one.number) // rise if rise > 0 else LONGEST


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates close to the longest sequence by bytes sent per token, least first; then the others by length."""
    longest = max((candidate.longest.seq_len for candidate in candidates), default=0)

    def order(candidate: Candidate) -> tuple[bool, float]:
        length, _, moved = candidate.longest
        close = length >= (1 - CLOSE) * longest
        return not close, moved / length if close else -length

    return sorted(candidates, key=order)


def chosen(config: Config, candidate: Candidate) -> Config:
    """The config of a candidate at its longest sequence."""
    config = changed(with_mesh(config, candidate.sizes, candidate.strategy), candidate.changes)
    return at_length(config, candidate.longest.seq_len)


def compiled_memory(config: Config, candidate: Candidate, devices: Sequence[jax.Device]) -> int:
    """Bytes per device that the candidate's step takes at its longest sequence, compiled for these devices.

    Raises:
      jax.errors.JaxRuntimeError: the compiler reports that it does not fit.
    """
    mesh = make_mesh(candidate.sizes, devices)
    model = build_model(chosen(config, candidate), mesh)
    analysis = trace_train_step(model, mesh).lower().compile().memory_analysis()
    assert analysis is not None, "CPU and TPU compilers give one"
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
