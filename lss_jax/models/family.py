"""What a family of models is: its module, and what `inspection` asks about it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.setting import Between
from lss_jax.attention.traffic import Traffic
from lss_jax.config.rules import MeshSizes
from lss_jax.config.schema import Config
from lss_jax.parallel.layout import SEQUENCE

Trained = dict[str, Any]


def has_no_patches(config: Config, _sizes: MeshSizes | None) -> Iterator[str]:
    """`Family.problems` of a family whose layers attend over tokens: options that are for a hierarchy alone."""
    for key in ("patch", "local_layers", "local_width"):
        value = getattr(config.model, key)
        if value > 0:
            yield (
                f"model.{key}={value} has no use with model.family={config.model.family!r}, which has no decoder "
                f'within patches; use model.{key}=0 or model.family="hierarchical"'
            )


class AttentionLayers(NamedTuple):
    """The layers of a model with one kind of attention, as those of a config on a mesh."""

    config: Config  # that of the model, but for what these layers have of their own
    mesh: Mesh | AbstractMesh
    between: Between
    scope: str  # one of `parallel.scopes`
    reached: bool  # by the backward pass


class Costs(NamedTuple):
    """What a training step sends and computes, by formulas that are compared with the compiled program.

    `Trained` is a tree of booleans like the parameters: a backward pass computes what the trained ones need.
    """

    traffic: Callable[[Config, Mesh | AbstractMesh, Trained], Iterator[tuple[str, Traffic]]]  # over `model`, with scope
    products: Callable[[Config, Mesh | AbstractMesh, Trained], int]  # operations of matrix products, per device
    attentions: Callable[[Config, Mesh | AbstractMesh, Trained], list[AttentionLayers]]
    reaches_layers: Callable[[Trained, str], bool]  # whether the backward pass goes through a stack, by its name
    # over `seq`, but for what attention sends
    exchanges: Callable[[Config, Mesh | AbstractMesh], Iterator[tuple[str, Traffic]]] = lambda _config, _mesh: iter(())


class Family(NamedTuple):
    """A family of models. Without `costs` it trains, but `audit` and `plan` refuse it."""

    module: Callable[[Config, nnx.Rngs], nnx.Module]
    serves: frozenset[str]  # those of `tasks.task.NEEDS` that its outputs are
    costs: Costs | None = None
    problems: Callable[[Config, MeshSizes | None], Iterator[str]] = has_no_patches  # what it cannot do, a line each
    generates: bool = False  # whether the module has a method `recall`, as the decoder's
    gathers_weights: bool = False  # whether it calls `layers.whole` where it uses weights that are sharded at rest
    sequences: tuple[str, ...] = (SEQUENCE,)  # each of which a stack of layers is for
