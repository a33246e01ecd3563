"""The parameters of an imported run before its first step: each process reads what its own devices hold."""

from pathlib import Path

import jax
from flax import traverse_util
from jax.sharding import Mesh

from lss_jax.huggingface.run import imported
from lss_jax.models import Model, Params
from lss_jax.training.checkpointing import converted, natural_like, params_like
from lss_jax.training.state import param_shardings


def imported_params(model: Model, mesh: Mesh, workdir: Path) -> Params:
    """What a run in `workdir` was made of, placed on this mesh; all but adapters, or nothing if it was not imported.

    Raises:
      ConfigError: it is damaged, or not that of the model.
    """
    found = imported(workdir, model)
    if found is None:
        return {}
    stored = traverse_util.flatten_dict(params_like(model, mesh), sep="/")
    natural = traverse_util.flatten_dict(natural_like(params_like(model, mesh), model.natural_shapes), sep="/")
    read = {name: found.array(name, like) for name, like in natural.items() if found.has(name)}
    return traverse_util.unflatten_dict(converted(read, {name: stored[name] for name in read}), sep="/")


def with_fresh_adapters(given: Params, model: Model, mesh: Mesh) -> Params:
    """All parameters of a run before its first step: those given, and the others as its seed makes them."""

    def completed(given: Params) -> Params:
        return model.with_part(given, model.init(jax.random.key(model.config.seed)))

    return jax.jit(completed, out_shardings=param_shardings(model, mesh), donate_argnums=0)(given)
