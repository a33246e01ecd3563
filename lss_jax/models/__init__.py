"""Model families, each as pure functions over one nested dict of parameters.

A new family is one file, and one line in `FAMILIES`: an NNX module made of `(config, rngs)` that maps a local batch's
inputs and a `Segment` to its outputs. Each of its parameters says in its metadata how it is sharded (`spec`), and
whether it has a row for each position, and of which sequence (`row_per_position`). A family that `generates` text has
a module with a method `recall`, as the decoder's, and `remember` if it reads pairs. Linear maps of the class `Linear`
can have adapters.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import AbstractMesh, Mesh

from lss_jax.config.schema import Config, ConfigError, unknown_choice
from lss_jax.models import decoder_costs, encoder_decoder_costs, hierarchical_costs
from lss_jax.models.adapters import add_adapters
from lss_jax.models.decoder import Decoder
from lss_jax.models.encoder import Encoder
from lss_jax.models.encoder_decoder import EncoderDecoder
from lss_jax.models.family import Costs, Family
from lss_jax.models.freezing import freeze, name_of
from lss_jax.models.hierarchical import Hierarchical
from lss_jax.models.layers import is_frozen
from lss_jax.models.shares import NOT_GATHERED, place_weights
from lss_jax.parallel.layout import SEQUENCE, SOURCE

TRANSFORMER, OF_PAIRS, HIERARCHICAL = (
    Costs(costs.traffic, costs.products, costs.attentions, costs.reaches_layers)
    for costs in (decoder_costs, encoder_decoder_costs, hierarchical_costs)
)
FAMILIES = {
    "decoder": Family(Decoder, frozenset({"next_token"}), TRANSFORMER, generates=True, gathers_weights=True),
    "encoder": Family(Encoder, frozenset({"tokens", "classes", "pooled"}), TRANSFORMER, gathers_weights=True),
    "encoder_decoder": Family(
        EncoderDecoder,
        frozenset({"pairs"}),
        OF_PAIRS,
        generates=True,
        gathers_weights=True,
        sequences=(SEQUENCE, SOURCE),
    ),
    "hierarchical": Family(
        Hierarchical,
        frozenset({"next_token"}),
        HIERARCHICAL._replace(exchanges=hierarchical_costs.exchanges),
        problems=hierarchical_costs.problems,
        gathers_weights=True,
    ),
}

Params = dict[str, Any]  # nested, leaves are arrays; names as in the modules


@dataclasses.dataclass(frozen=True)
class Model:
    """A family's module, taken apart: structure here, parameters in the training state.

    `shapes`, `specs`, `row_per_position`, `trained` and `names` are nested dicts like the parameters: global
    `ShapeDtypeStruct`s, `PartitionSpec`s, the sequence whose positions a table's rows are of ("" for what is no table),
    booleans, and names such as `stack/blocks/mlp/up/kernel`. Weights that are sharded at rest may be padded, so that
    the mesh divides them: `natural_shapes` are those without padding, as checkpoints have them, and `gathers` says how
    often each is gathered. Those of `on_host`, and all that the optimizer knows of them, rest in the host's memory.
    """

    config: Config
    graphdef: nnx.GraphDef
    shapes: Params
    natural_shapes: Params
    specs: Params
    row_per_position: Params
    trained: Params
    names: Params
    gathers: Params
    on_host: Params

    def init(self, key: jax.Array) -> Params:
        """Fresh global parameters; the values depend on the key alone, not on any sharding."""
        params = nnx.to_pure_dict(nnx.state(module_of(self.config, nnx.Rngs(key))))
        return jax.tree.map(lambda param, like: resized(param, like.shape), params, self.shapes)

    def apply(self, params: Params, *args) -> Any:
        """Calls the module with these (local) parameters."""
        return nnx.merge(self.graphdef, params)(*args)

    def recall(self, params: Params, *args) -> tuple[Any, Any]:
        """Calls the module's `recall`: returns the outputs, and what each layer's attention adds to the cache."""
        return nnx.merge(self.graphdef, params).recall(*args)

    def remember(self, params: Params, *args) -> Any:
        """Calls the module's `remember`: returns what each layer's attention to a source reads."""
        return nnx.merge(self.graphdef, params).remember(*args)

    def with_tables(self, change: Callable[[Any, str], Any], params: Params) -> Params:
        """Applies `change(table, sequence)` to each parameter that has a row per position; returns the whole tree.

        `params` are all parameters, or the trained ones alone; `sequence` is that whose positions the rows are of.
        """
        of = traverse_util.flatten_dict(self.row_per_position)
        flat = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict({at: change(p, of[at]) if of[at] else p for at, p in flat.items()})

    def only_trained(self, tree: Params) -> Params:
        """The part of a tree like the parameters that belongs to the trained ones."""
        is_trained = traverse_util.flatten_dict(self.trained)
        flat = traverse_util.flatten_dict(tree)
        return traverse_util.unflatten_dict({at: leaf for at, leaf in flat.items() if is_trained[at]})

    def with_part(self, part: Params, params: Params) -> Params:
        """All parameters, with those replaced that are in a part of them, such as the trained ones."""
        flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(part)
        return traverse_util.unflatten_dict(flat)


def resized(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The array with another shape: cropped, or padded with zeros, after the end of each dimension."""
    cropped = array[tuple(map(slice, shape))]
    return jnp.pad(cropped, [(0, to - size) for to, size in zip(shape, cropped.shape, strict=True)])


def family_problems(config: Config) -> Iterator[str]:
    """What is wrong with the config's family: its name, or what it cannot do."""
    family = config.model.family
    if family not in FAMILIES:
        yield unknown_choice("model.family", family, FAMILIES)
    elif not FAMILIES[family].gathers_weights:
        fetches = f"model.family={family!r} does not gather weights, which"
        if config.mesh.shard == "all":
            yield f'{fetches} mesh.shard="all" needs; use mesh.shard="none"'
        if config.optim.offload:
            yield f"{fetches} optim.offload=True needs; use optim.offload=False"


def costs_of(model: "Model") -> Costs:
    """What the model's family declares for `inspection`.

    Raises:
      ConfigError: the family declares none.
    """
    family = model.config.model.family
    costs = FAMILIES[family].costs
    if costs is None:
        raise ConfigError(f"model.family={family!r} does not say what a step costs; declare its `Costs` in FAMILIES")
    return costs


def module_of(config: Config, rngs: nnx.Rngs) -> nnx.Module:
    """A fresh module of the config's family, with adapters if the config has some.

    Raises:
      ConfigError: there is none of that name, or no linear map that an adapter is for.
    """
    for problem in family_problems(config):
        raise ConfigError(problem)
    module = FAMILIES[config.model.family].module(config, rngs)
    if config.lora.rank:
        add_adapters(module, config.lora, rngs)  # last: the values of other parameters do not depend on them
    return module


def build_model(config: Config, mesh: Mesh | AbstractMesh | None = None) -> Model:
    """The model of a config, its weights placed on a mesh as `mesh.shard` and `optim.offload` say; allocates nothing.

    Without a mesh no weight is sharded at rest, or on the host.

    Raises:
      ConfigError: no family has the name `model.family`, or a pattern of `optim.frozen` or `lora.targets` matches
        nothing.
    """
    module = nnx.eval_shape(lambda: module_of(config, nnx.Rngs(0)))
    freeze(module, config)
    natural_shapes = nnx.to_pure_dict(nnx.state(module))
    if mesh is not None:
        place_weights(module, config, mesh)
    graphdef, state = nnx.split(module)

    def metadata(read: Callable[[nnx.Variable], Any]) -> Params:
        return nnx.to_pure_dict(jax.tree.map(read, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))

    shapes, specs = nnx.to_pure_dict(state), metadata(lambda variable: variable.spec)
    tables = metadata(lambda variable: variable.get_metadata().get("row_per_position", ""))
    gathers = metadata(lambda variable: variable.get_metadata().get("gathers", NOT_GATHERED))
    on_host = metadata(lambda variable: variable.get_metadata().get("on_host", False))
    trained = metadata(lambda variable: not is_frozen(variable))
    names = jax.tree_util.tree_map_with_path(lambda path, _: name_of(key.key for key in path), shapes)
    return Model(config, graphdef, shapes, natural_shapes, specs, tables, trained, names, gathers, on_host)


def parameter_count(model: Model) -> int:
    """The number of scalars in all (global) parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.natural_shapes))


def trained_count(model: Model) -> int:
    """The number of scalars in the trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.only_trained(model.natural_shapes)))


def shown_count(model: Model) -> str:
    """The number of parameters in words, with that of the trained ones if not all are."""
    count, trained = parameter_count(model), trained_count(model)
    some = f", {trained:,} of them trained ({trained / count:.2%})" if trained < count else ""
    return f"{count:,} parameters{some}"
