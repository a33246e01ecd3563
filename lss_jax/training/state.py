"""The training state: global arrays, sharded over the mesh by their specs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.models import Model
from lss_jax.parallel.host_memory import HOST
from lss_jax.parallel.layout import length_of, padded_length
from lss_jax.parallel.mesh import DATA, SEQ, axes_of, like, named_axes, sharded_axes, shardings


class TrainState(NamedTuple):
    """`step` counts finished optimizer steps; with the seed it also fixes the position in the data."""

    step: Any
    params: Any
    opt_state: Any


def state_shardings(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> TrainState:
    """The sharding of every array of the state; moments are where their parameter is, sharded like it, or further."""
    everywhere = NamedSharding(mesh, P())
    moments = of_moments(
        optimizer, model, _placed(moment_specs(model, mesh), model, mesh), of_others=lambda _: everywhere
    )
    return TrainState(everywhere, param_shardings(model, mesh), moments)


def moments_like(optimizer: optax.GradientTransformation, model: Model, params: Any) -> Any:
    """Shapes and dtypes of the optimizer's state, which has moments of the trained ones of these parameters."""
    return jax.eval_shape(optimizer.init, model.only_trained(params))


def of_moments(
    optimizer: optax.GradientTransformation, model: Model, of_params: Any, of_others: Callable[[Any], Any]
) -> Any:
    """A tree like the optimizer's state, in which each moment has what its parameter has in the tree `of_params`.

    Parameters that are not trained have no moments.
    """
    return optax.tree_map_params(
        optimizer,
        lambda moment, of_param: moment if _is_masked(moment) else of_param,
        moments_like(optimizer, model, model.shapes),
        model.only_trained(of_params),
        transform_non_params=of_others,
        is_leaf=_is_masked,
    )


def param_shardings(model: Model, mesh: Mesh | AbstractMesh) -> Any:
    """The shardings of the parameters in the state, on the device or in the host's memory."""
    return _placed(param_specs(model, mesh), model, mesh)


def _placed(specs: Any, model: Model, mesh: Mesh | AbstractMesh) -> Any:
    def of_leaf(placed: NamedSharding, on_host: bool) -> NamedSharding:
        return placed.with_memory_kind(HOST) if on_host else placed

    return jax.tree.map(of_leaf, shardings(specs, mesh), model.on_host)


def _is_masked(moment: Any) -> bool:
    """Whether another rule of the optimizer has the parameter: then this one has no moment of it."""
    return isinstance(moment, optax.MaskedNode)


def moment_specs(model: Model, mesh: Mesh | AbstractMesh) -> Any:
    """The specs of the optimizer's moments: those of the parameters, or with `mesh.shard="optimizer"` sharded further.

    ZeRO-1 (Rajbhandari et al. 2020, arXiv 1910.02054, Sec. 5.1): the replicas of a parameter shard its moments among
    them. XLA then lets each device update its shard of the parameter and gathers the shards: one all-gather per
    parameter.
    """
    specs = param_specs(model, mesh)
    if model.config.mesh.shard != "optimizer":
        return specs
    return jax.tree.map(lambda spec, leaf: _shard_further(spec, leaf.shape, mesh), specs, model.shapes)


def _shard_further(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec with `data` and `seq`, where it omits them, added to the first dimension that both divide, or one."""
    free = [axis for axis in (DATA, SEQ) if axis in sharded_axes(mesh) and axis not in named_axes(spec)]
    parts = [axes_of(part) for part in spec] + [()] * (len(shape) - len(spec))
    for axes in (free, free[:1], free[1:]):
        for dimension, size in enumerate(shape):
            sharded = (*parts[dimension], *axes)
            if size % math.prod(mesh.shape[axis] for axis in sharded) == 0:
                return P(*parts[:dimension], sharded, *parts[dimension + 1 :])
    return spec


def param_specs(model: Model, mesh: Mesh | AbstractMesh) -> Any:
    """The specs of the parameters in the state: the model's, but tables that sharding would pad are replicated."""
    config = model.config

    def in_state(spec: P, sequence: str) -> P:
        return spec if padded_length(config, mesh, sequence) == length_of(config, sequence) else P()

    return model.with_tables(in_state, model.specs)


def state_like(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes and shardings of the state."""
    moments = moments_like(optimizer, model, model.shapes)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), model.shapes, moments)
    return like(shapes, state_shardings(model, optimizer, mesh))


def init_state(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, given: Any = None
) -> TrainState:
    """A fresh state, created in its shards; its values are the same on every mesh.

    The parameters that are `given` (and donated) are not made anew: they may be some of them, or all.
    """

    def create(given: Any) -> TrainState:
        params = model.with_part(given, model.init(jax.random.key(seed)))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(model.only_trained(params)))

    created = jax.jit(create, out_shardings=state_shardings(model, optimizer, mesh), donate_argnums=0)
    return created(given or {})
