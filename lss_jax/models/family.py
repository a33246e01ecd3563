"""What a family of models is: its module, and what `inspection` asks about it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.traffic import Traffic
from lss_jax.config.schema import Config

Trained = dict[str, Any]


class Costs(NamedTuple):
    """What a training step sends and computes, by formulas that are compared with the compiled program.

    `Trained` is a tree of booleans like the parameters: a backward pass computes what the trained ones need.
    """

    traffic: Callable[[Config, Mesh | AbstractMesh, Trained], Iterator[tuple[str, Traffic]]]  # over `model`, with scope
    products: Callable[[Config, Mesh | AbstractMesh, Trained], int]  # operations of matrix products, per device
    reaches_layers: Callable[[Trained], bool]  # whether the backward pass goes through the layers


class Family(NamedTuple):
    """A family of models. Without `costs` it trains, but `audit` and `plan` refuse it."""

    module: Callable[[Config, nnx.Rngs], nnx.Module]
    serves: frozenset[str]  # those of `tasks.task.NEEDS` that its outputs are
    costs: Costs | None = None
    generates: bool = False  # whether the module has a method `recall`, as the decoder's
    gathers_weights: bool = False  # whether it calls `layers.whole` where it uses weights that are sharded at rest
