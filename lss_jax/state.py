"""The training state: global arrays, of which each device holds what their specs say."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.attention.setting import layout_on
from lss_jax.mesh import DATA, SEQ, axes_of, cut_axes, named_axes, shardings
from lss_jax.models import Model


class TrainState(NamedTuple):
    """`step` counts finished optimizer steps; with the seed it also fixes the position in the data."""

    step: Any
    params: Any
    opt_state: Any


def state_shardings(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings like the state; the optimizer's moments lie where their parameter lies, or are cut further."""
    specs = kept_specs(model, mesh)
    moments = optax.tree_map_params(
        optimizer,
        lambda moment, spec: moment if _is_masked(moment) else spec,
        jax.eval_shape(optimizer.init, model.shapes),
        moment_specs(model, mesh),
        transform_non_params=lambda _: P(),
        is_leaf=_is_masked,
    )
    return shardings(TrainState(P(), specs, moments), mesh)


def _is_masked(moment: Any) -> bool:
    """Whether another rule of the optimizer has the parameter: then this one has no moment of it."""
    return isinstance(moment, optax.MaskedNode)


def moment_specs(model: Model, mesh: Mesh | AbstractMesh) -> Any:
    """How a parameter's moments lie: like it, or with `optim.shard_state` each of its copies has a share of them.

    ZeRO-1 (Rajbhandari et al. 2020, arXiv 1910.02054, Sec. 5.1). XLA then lets each device update its share of a
    parameter and gathers the shares: one all-gather per parameter.
    """
    specs = kept_specs(model, mesh)
    if not model.config.optim.shard_state:
        return specs
    return jax.tree.map(lambda spec, leaf: _cut_further(spec, leaf.shape, mesh), specs, model.shapes)


def _cut_further(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Cut also over `data` and `seq`, where the spec leaves them out: the first dimension that takes both, or one."""
    free = [axis for axis in (DATA, SEQ) if axis in cut_axes(mesh) and axis not in named_axes(spec)]
    parts = [axes_of(part) for part in spec] + [()] * (len(shape) - len(spec))
    for axes in (free, free[:1], free[1:]):
        for dimension, size in enumerate(shape):
            cut = (*parts[dimension], *axes)
            if size % math.prod(mesh.shape[axis] for axis in cut) == 0:
                return P(*parts[:dimension], cut, *parts[dimension + 1 :])
    return spec


def kept_specs(model: Model, mesh: Mesh | AbstractMesh) -> Any:
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
