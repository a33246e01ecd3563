"""Model families, each as pure functions over one nested dict of parameters."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from lss_jax.config.schema import Config
from lss_jax.models.decoder import Decoder

FAMILIES = {"decoder": Decoder}

Params = dict[str, Any]  # nested, leaves are arrays; names as in the modules


@dataclasses.dataclass(frozen=True)
class Model:
    """A family's module, taken apart: structure here, parameters in the training state.

    `shapes` and `specs` are nested dicts like the parameters: global `ShapeDtypeStruct`s and `PartitionSpec`s.
    """

    config: Config
    graphdef: nnx.GraphDef
    shapes: Params
    specs: Params

    def init(self, key: jax.Array) -> Params:
        """Fresh global parameters; the values depend on the key alone, not on any sharding."""
        module = FAMILIES[self.config.model.family](self.config, nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module))

    def apply(self, params: Params, *args) -> jax.Array:
        """Calls the module with these (local) parameters."""
        return nnx.merge(self.graphdef, params)(*args)

    def recall(self, params: Params, past: jax.Array, *args) -> tuple[jax.Array, jax.Array]:
        """Calls the module with each layer's attention handed its part of `past` (layers first), in a variable.

        Returns the module's result, and what attention left in the variables. The scan over layers carries them.
        """
        module = nnx.merge(self.graphdef, params)
        attention = module.stack.blocks.attention
        attention.cache = nnx.Cache(past)
        result = module(*args)
        return result, attention.cache[...]


def build_model(config: Config) -> Model:
    """The model of a config; allocates nothing."""
    module = nnx.eval_shape(lambda: FAMILIES[config.model.family](config, nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    specs = jax.tree.map(lambda variable: variable.spec, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return Model(config, graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(specs))


def parameter_count(model: Model) -> int:
    """How many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.shapes))
