"""The training state: global arrays, of which each device holds what their specs say."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.attention.setting import layout_on
from lss_jax.mesh import SEQ, named_axes, shardings
from lss_jax.models import Model


class TrainState(NamedTuple):
    """`step` counts finished optimizer steps; with the seed it also fixes the position in the data."""

    step: Any
    params: Any
    opt_state: Any


def state_shardings(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings like the state; the optimizer's moments lie where their parameter lies."""
    specs = kept_specs(model, mesh)
    moments = optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        jax.eval_shape(optimizer.init, model.shapes),
        specs,
        transform_non_params=lambda _: P(),
    )
    return shardings(TrainState(P(), specs, moments), mesh)


def kept_specs(model: Model, mesh: Mesh) -> Any:
    """How parameters lie between steps: as in the model, but whole where they would have to be padded to be cut."""
    seq_len = model.config.data.seq_len
    if layout_on(model.config, mesh).padded(seq_len) == seq_len:
        return model.specs
    return jax.tree.map(lambda spec: P() if SEQ in named_axes(spec) else spec, model.specs)


def init_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, created in place on the mesh; the same values on every mesh."""

    def create() -> TrainState:
        params = model.init(jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(create, out_shardings=state_shardings(model, optimizer, mesh))()
