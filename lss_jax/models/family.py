"""What a family of models is: its module, and what `inspection` asks about it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.traffic import Traffic
from lss_jax.config.rules import MeshSizes
from lss_jax.config.schema import Config

Trained = dict[str, Any]
Attended = tuple[Config, Mesh | AbstractMesh]  # one of a model's attentions, as that of a config on a mesh


def attends_over_tokens(config: Config, mesh: Mesh | AbstractMesh) -> Iterator[Attended]:
    """`Costs.attended` of a family whose layers attend over the tokens of the sequence."""
    yield config, mesh


def exchanges_nothing(_config: Config, _mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, Traffic]]:
    """`Costs.exchanges` of a family that leaves all communication over `seq` to attention."""
    yield from ()


def has_no_patches(config: Config, _sizes: MeshSizes | None) -> Iterator[str]:
    """`Family.problems` of a family whose layers attend over tokens: options that are for a hierarchy alone."""
    for key in ("patch", "local_layers", "local_width"):
        value = getattr(config.model, key)
        if value > 0:
            yield (
                f"model.{key}={value} has no use with model.family={config.model.family!r}, which has no decoder "
                f'within patches; use model.{key}=0 or model.family="hierarchical"'
            )


class Costs(NamedTuple):
    """What a training step sends and computes, by formulas that are compared with the compiled program.

    `Trained` is a tree of booleans like the parameters: a backward pass computes what the trained ones need.
    """

    traffic: Callable[[Config, Mesh | AbstractMesh, Trained], Iterator[tuple[str, Traffic]]]  # over `model`, with scope
    products: Callable[[Config, Mesh | AbstractMesh, Trained], int]  # operations of matrix products, per device
    reaches_layers: Callable[[Trained], bool]  # whether the backward pass goes through the layers
    attended: Callable[[Config, Mesh | AbstractMesh], Iterator[Attended]]  # what the layers attend over
    exchanges: Callable[[Config, Mesh | AbstractMesh], Iterator[tuple[str, Traffic]]]  # over `seq`, outside attention


class Family(NamedTuple):
    """A family of models. Without `costs` it trains, but `audit` and `plan` refuse it."""

    module: Callable[[Config, nnx.Rngs], nnx.Module]
    serves: frozenset[str]  # those of `tasks.task.NEEDS` that its outputs are
    costs: Costs | None = None
    problems: Callable[[Config, MeshSizes | None], Iterator[str]] = has_no_patches  # what it cannot do, a line each
    generates: bool = False  # whether the module has a method `recall`, as the decoder's
    gathers_weights: bool = False  # whether it calls `layers.whole` where it uses weights that are sharded at rest
