"""The parameters with which a run starts that starts from another run: those of that run, and fresh adapters."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from lss_jax.config.schema import Config, ConfigError, from_dict
from lss_jax.models import Params, build_model
from lss_jax.storage.workdir import saved_config
from lss_jax.training.compatibility import shapes_of, shaping
from lss_jax.training.evaluation import restore_params


def check_start(config: Config) -> None:
    """Refuses a run in `start_from` whose parameters are not those of this config, adapters apart.

    Raises:
      ConfigError: there is no run, or it has other parameters; one line per key that shapes them.
    """
    if not config.start_from:
        return
    saved = from_dict(saved_config(Path(config.start_from)))
    misfits = shaping(saved, _with_adapters_of(saved, config), shapes_of)
    if misfits:
        raise ConfigError(
            "\n".join(
                f"start_from={config.start_from!r} is a run with {key}={then!r}, not {now!r}, and its parameters do "
                f"not fit; start from another run, or with --config.{key}={then}"
                for key, (then, now) in misfits.items()
            )
        )


def params_to_start_from(config: Config, mesh: Mesh) -> Params:
    """The newest parameters of the run in `start_from`, placed on this mesh; empty if there is no such run.

    Raises:
      ConfigError: the run has no sound checkpoint.
    """
    if not config.start_from:
        return {}
    folder = Path(config.start_from)
    model = build_model(_with_adapters_of(from_dict(saved_config(folder)), config), mesh)
    return restore_params(model, mesh, folder)[1]


def _with_adapters_of(saved: Config, config: Config) -> Config:
    """The config of the parameters that another run is to give: without adapters, if it has none."""
    if saved.lora.rank:
        return config
    nothing_frozen = dataclasses.replace(config.optim, frozen="")  # a pattern might be for adapters alone
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0), optim=nothing_frozen)
