"""The longest sequence of each mesh and strategy, and what it sends."""

import dataclasses
import math
from collections.abc import Callable, Iterator
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
from lss_jax.parallel.mesh import AXES, SEQ, named_axes
from lss_jax.training.setup import validate

TILE = 128  # lengths are multiples of so many tokens, and of what the mesh cuts them into


LONGEST = 2**31 - 1  # positions are int32


CLOSE = 0.05  # lengths that differ by less are as good as one another, and traffic decides


class Cost(NamedTuple):
    """Of a training step at one length, on one device, in bytes."""

    seq_len: int
    memory: Memory
    sent: float


class Cut(NamedTuple):
    """A mesh with a strategy, and what it can do."""

    sizes: MeshSizes
    strategy: str
    own: Cost  # at the config's length, whether it fits or not
    longest: Cost


class Impossible(NamedTuple):
    """A mesh with a strategy that a rule or the memory forbids."""

    sizes: MeshSizes
    strategy: str
    reason: str


def plan(config: Config, devices: int, memory: int) -> tuple[list[Cut], list[Impossible]]:
    """All cuts, the best first, and what is impossible.

    Raises:
      ConfigError: the config is wrong on any mesh.
    """
    validate(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1)), 1)
    model = build_model(config)
    cuts, impossible = [], []
    for sizes in meshes(devices):
        for strategy in STRATEGIES if sizes[1] > 1 else [config.attention.strategy]:  # uncut they are the same
            try:
                cuts.append(evaluate(model, sizes, strategy, memory))
            except ConfigError as error:
                impossible.append(Impossible(sizes, strategy, str(error).split("\n")[0].split(";")[0]))
    return ranked(cuts), impossible


def meshes(devices: int) -> Iterator[MeshSizes]:
    """All sizes (data, seq, model) with this product."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data in divisors:
        yield from ((data, seq, devices // data // seq) for seq in divisors if devices // data % seq == 0)


def evaluate(model: Model, sizes: MeshSizes, strategy: str, memory: int) -> Cut:
    """What a cut costs, at the config's length and at the longest that fits.

    Raises:
      ConfigError: it breaks a rule of the config, or not even the shortest sequence fits.
    """
    config, mesh = on_cut(model.config, sizes, strategy), AbstractMesh(sizes, AXES)
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
    return Cut(sizes, strategy, cost(config.data.seq_len), cost(longest))


def on_cut(config: Config, sizes: MeshSizes, strategy: str) -> Config:
    """The config on a mesh with a strategy; without what is for another one."""
    return dataclasses.replace(config, mesh=MeshConfig(*sizes), attention=with_strategy(config.attention, strategy))


def at_length(model: Model, seq_len: int) -> Model:
    """The same model for sequences of another length."""

    def with_rows(leaf: jax.ShapeDtypeStruct, spec: jax.sharding.PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((seq_len, *leaf.shape[1:]), leaf.dtype) if SEQ in named_axes(spec) else leaf

    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, seq_len=seq_len))
    return dataclasses.replace(model, config=config, shapes=jax.tree.map(with_rows, model.shapes, model.specs))


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `holds` is true, if it is so for all smaller ones; 0 if for none."""
    high = 1
    while high <= limit and holds(high):
        high *= 2
    low, high = high // 2, min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def ranked(cuts: list[Cut]) -> list[Cut]:
    """Of those that come close to the longest sequence the one that sends least per token first; the rest by length."""
    longest = max((cut.longest.seq_len for cut in cuts), default=0)

    def order(cut: Cut) -> tuple[bool, float]:
        length, _, moved = cut.longest
        close = length >= (1 - CLOSE) * longest
        return not close, moved / length if close else -length

    return sorted(cuts, key=order)


def chosen(config: Config, cut: Cut) -> Config:
    """The config of a cut at its longest."""
    config = on_cut(config, cut.sizes, cut.strategy)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=cut.longest.seq_len))
