"""What makes room for a longer sequence, from what costs least to what costs most, as changes to a config."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.strategy import Shards
from lss_jax.config.rules import MeshSizes
from lss_jax.config.schema import Config, with_value

TILE = 2048  # tokens: enough for a matrix product to be as fast as it gets

Changes = dict[str, Any]  # values by dotted key


def ways(config: Config, sizes: MeshSizes) -> Iterator[Changes]:
    """Yields what to change, one thing after the other, until every layer's input waits in host memory.

    In this order: sharded weights, tiles, recomputation, groups of heads, offload. What the config has already is left
    out, and what this mesh or the strategy has no use for.
    """
    for changes in _all(config, sizes):
        if changed(config, changes) != config:
            yield changes


def fewer_inputs(config: Config) -> Iterator[Changes]:
    """Yields ever larger distances between the layers whose input waits in host memory."""
    every = config.model.remat_every
    while config.model.layers % (2 * every) == 0:
        every *= 2
        yield {"model.remat_every": every}


def state_on_host(config: Config) -> Iterator[Changes]:
    """Yields what puts weights, gradients and moments into host memory, if the config's optimizer can be there."""
    if config.optim.name != "muon" and not config.optim.offload:
        yield {"optim.offload": True}


def changed(config: Config, changes: Changes) -> Config:
    """The config with these changes."""
    for key, value in changes.items():
        config = with_value(config, key, value)
    return config


def _all(config: Config, sizes: MeshSizes) -> Iterator[Changes]:
    if config.optim.name != "muon" and sizes[0] * sizes[1] > 1:
        yield {"mesh.shard": "all"}
    yield {"model.tile": config.model.tile or TILE}
    if config.model.remat == "none":
        yield {"model.remat": "block"}
    again = {"attention.regather": True} if "regather" in STRATEGIES[config.attention.strategy].options else {}
    yield {"attention.head_groups": max(config.attention.head_groups, _most_groups(config, sizes)), **again}
    yield {"model.remat": "offload"}


def _most_groups(config: Config, sizes: MeshSizes) -> int:
    """The largest number of groups of heads that the strategy can compute on this mesh."""
    model, strategy = config.model, STRATEGIES[config.attention.strategy]
    shards, here = Shards(model.heads, model.kv_heads, *sizes[1:]), model.kv_heads // sizes[2]

    def possible(groups: int) -> bool:
        attention = dataclasses.replace(config.attention, head_groups=groups)
        return here % groups == 0 and not list(strategy.problems(attention, shards))

    return max((groups for groups in range(1, here + 1) if possible(groups)), default=1)
