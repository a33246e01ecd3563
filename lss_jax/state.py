"""The training state: global arrays, of which each device holds what their specs say."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.mesh import shardings
from lss_jax.models import Model


class TrainState(NamedTuple):
    """`step` counts finished optimizer steps; with the seed it also fixes the position in the data."""

    step: Any
    params: Any
    opt_state: Any


def state_shardings(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings like the state; the optimizer's moments lie where their parameter lies."""
    opt_shapes = jax.eval_shape(optimizer.init, model.shapes)
    moments = optax.tree_map_params(
        optimizer, lambda _, spec: spec, opt_shapes, model.specs, transform_non_params=lambda _: P()
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    specs, shapes = TrainState(P(), model.specs, moments), TrainState(step, model.shapes, opt_shapes)
    return shardings(specs, mesh, shapes)


def init_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, created in place on the mesh; the same values on every mesh."""

    def create() -> TrainState:
        params = model.init(jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(create, out_shardings=state_shardings(model, optimizer, mesh))()
