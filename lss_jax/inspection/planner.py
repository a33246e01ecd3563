"""The longest sequence that fits on each mesh with each strategy, and the bytes that a step of it sends."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from lss_jax.attention.strategies import STRATEGIES, with_strategy
from lss_jax.config.rules import MeshSizes
from lss_jax.config.schema import Config, ConfigError, MeshConfig
from lss_jax.config.units import shown_size
from lss_jax.inspection.contract import predicted, sent
from lss_jax.inspection.memory import Memory, memory_of
from lss_jax.models import Model, build_model
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import AXES, make_mesh
from lss_jax.training.setup import validate
from lss_jax.training.step import trace_train_step

TILE = 128  # lengths are multiples of this, and of the number of segments (or chunks) that the mesh makes of them
LONGEST = 2**31 - 1  # positions are int32
EXACT = 0.005  # the longest length is found to within this fraction
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
    own: Cost  # at the config's length, whether it fits or not
    longest: Cost  # at the longest that fits


class Impossible(NamedTuple):
    """A mesh with a strategy that a rule or the memory forbids."""

    sizes: MeshSizes
    strategy: str
    reason: str


def plan(config: Config, devices: int, memory: int) -> tuple[list[Candidate], list[Impossible]]:
    """All candidates, the best first, and what is impossible.

    Raises:
      ConfigError: the config is wrong on any mesh.
    """
    validate(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1, "none")), 1)
    candidates, impossible = [], []
    for sizes in meshes(devices):
        for strategy in STRATEGIES if sizes[1] > 1 else [config.attention.strategy]:  # on one device they are the same
            try:
                candidates.append(evaluate(config, sizes, strategy, memory))
            except ConfigError as error:
                impossible.append(Impossible(sizes, strategy, str(error).split("\n")[0].split(";")[0]))
    return ranked(candidates), impossible


def meshes(devices: int) -> Iterator[MeshSizes]:
    """Yields all sizes (data, seq, model) whose product is `devices`."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data in divisors:
        yield from ((data, seq, devices // data // seq) for seq in divisors if devices // data % seq == 0)


def evaluate(config: Config, sizes: MeshSizes, strategy: str, memory: int) -> Candidate:
    """Costs on this mesh with this strategy, at the config's length and at the longest that fits in `memory` bytes.

    Raises:
      ConfigError: it breaks a rule of the config, or not even the shortest sequence fits.
    """
    config, mesh = with_mesh(config, sizes, strategy), AbstractMesh(sizes, AXES)
    validate(config, math.prod(sizes))

    def at(seq_len: int) -> Model:
        return build_model(at_length(config, seq_len), mesh)

    @cache
    def memory_at(seq_len: int) -> Memory:
        return memory_of(at(seq_len), mesh)

    def cost(seq_len: int) -> Cost:
        return Cost(seq_len, memory_at(seq_len), sent(predicted(at(seq_len), mesh), mesh))

    step = math.lcm(layout_on(config, mesh).padded(1), TILE)
    first = max(1, config.data.seq_len // step)
    tiles = largest(lambda count: memory_at(count * step).total, memory, LONGEST // step, first)
    if not tiles:
        needed = shown_size(memory_at(step).total)
        raise ConfigError(f"{step:,} tokens need {needed}, more than --memory={shown_size(memory)}; use more devices")
    longest = tiles * step
    validate(at(longest).config, math.prod(sizes))
    return Candidate(sizes, strategy, cost(config.data.seq_len), cost(longest))


def with_mesh(config: Config, sizes: MeshSizes, strategy: str) -> Config:
    """The config on this mesh with this strategy, without the options of another strategy."""
    return dataclasses.replace(
        config, mesh=MeshConfig(*sizes, config.mesh.shard), attention=with_strategy(config.attention, strategy)
    )


def at_length(config: Config, seq_len: int) -> Config:
    """The config with another sequence length."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len))


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
    return at_length(with_mesh(config, candidate.sizes, candidate.strategy), candidate.longest.seq_len)


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
