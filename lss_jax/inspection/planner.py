"""The longest sequence that fits on each mesh with each strategy, and the bytes that a step of it sends."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
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
    model = build_model(config)
    candidates, impossible = [], []
    for sizes in meshes(devices):
        for strategy in STRATEGIES if sizes[1] > 1 else [config.attention.strategy]:  # on one device they are the same
            try:
                candidates.append(evaluate(model, sizes, strategy, memory))
            except ConfigError as error:
                impossible.append(Impossible(sizes, strategy, str(error).split("\n")[0].split(";")[0]))
    return ranked(candidates), impossible


def meshes(devices: int) -> Iterator[MeshSizes]:
    """Yields all sizes (data, seq, model) whose product is `devices`."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data in divisors:
        yield from ((data, seq, devices // data // seq) for seq in divisors if devices // data % seq == 0)


def evaluate(model: Model, sizes: MeshSizes, strategy: str, memory: int) -> Candidate:
    """Costs on this mesh with this strategy, at the config's length and at the longest that fits in `memory` bytes.

    Raises:
      ConfigError: it breaks a rule of the config, or not even the shortest sequence fits.
    """
    config, mesh = with_mesh(model.config, sizes, strategy), AbstractMesh(sizes, AXES)
    validate(config, math.prod(sizes))

    def at(seq_len: int) -> Model:
        return at_length(dataclasses.replace(model, config=config), seq_len)

    def fits(seq_len: int) -> bool:
        return memory_of(at(seq_len), mesh).total <= memory

    def cost(seq_len: int) -> Cost:
        return Cost(seq_len, memory_of(at(seq_len), mesh), sent(predicted(at(seq_len), mesh), mesh))

    step = math.lcm(layout_on(config, mesh).padded(1), TILE)
    tiles = largest(lambda count: fits(count * step), LONGEST // step)
    if not tiles:
        needed = shown_size(memory_of(at(step), mesh).total)
        raise ConfigError(f"{step:,} tokens need {needed}, more than --memory={shown_size(memory)}; use more devices")
    longest = tiles * step
    validate(at(longest).config, math.prod(sizes))
    return Candidate(sizes, strategy, cost(config.data.seq_len), cost(longest))


def with_mesh(config: Config, sizes: MeshSizes, strategy: str) -> Config:
    """The config on this mesh with this strategy, without the options of another strategy."""
    return dataclasses.replace(
        config, mesh=MeshConfig(*sizes, config.mesh.shard), attention=with_strategy(config.attention, strategy)
    )


def at_length(model: Model, seq_len: int) -> Model:
    """The model with another sequence length."""

    def with_rows(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((seq_len, *leaf.shape[1:]), leaf.dtype)

    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, seq_len=seq_len))
    return dataclasses.replace(model, config=config, shapes=model.with_tables(with_rows, model.shapes))


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `holds` is true, 0 if there is none; it must be true for all below."""
    high = 1
    while high <= limit and holds(high):
        high *= 2
    low, high = high // 2, min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


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
    config = with_mesh(config, candidate.sizes, candidate.strategy)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=candidate.longest.seq_len))


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
