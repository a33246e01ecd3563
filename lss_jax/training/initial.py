"""The parameters of a run before its first step: random, or imported."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from lss_jax.huggingface.importing import Import
from lss_jax.huggingface.run import imported
from lss_jax.models import Model, Params
from lss_jax.training.checkpointing import converted, natural_like, params_like
from lss_jax.training.state import TrainState, init_state, state_shardings


def initial_state(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, workdir: Path, seed: int
) -> TrainState:
    """The state of a run in `workdir` before its first step.

    Raises:
      ConfigError: what it starts from is damaged, or has another model.
    """
    params = imported_params(model, mesh, workdir, seed)
    if params is None:
        return init_state(model, optimizer, mesh, seed)
    placed = state_shardings(model, optimizer, mesh)

    def create(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(create, out_shardings=placed, donate_argnums=0)(params)


def imported_params(model: Model, mesh: Mesh, workdir: Path, seed: int) -> Params | None:
    """The parameters that a run in `workdir` starts from, None if they are random; adapters are fresh ones."""
    found = imported(workdir, model)
    return None if found is None else _params_of(found, model, mesh, seed)


def _params_of(found: Import, model: Model, mesh: Mesh, seed: int) -> Params:
    stored = params_like(model, mesh)
    like = traverse_util.flatten_dict(natural_like(stored, model.natural_shapes), sep="/")
    missing = {name: leaf.sharding for name, leaf in like.items() if not found.has(name)}

    def fresh() -> Params:
        params = traverse_util.flatten_dict(model.init(jax.random.key(seed)), sep="/")
        return {name: params[name] for name in missing}

    flat = {name: found.array(name, leaf) for name, leaf in like.items() if found.has(name)}
    flat |= jax.jit(fresh, out_shardings=missing)() if missing else {}
    return converted(traverse_util.unflatten_dict(flat, sep="/"), stored)
