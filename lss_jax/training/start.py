"""The parameters with which a run starts: what it was imported with, those of another run, or fresh ones."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from lss_jax.config.schema import Config, ConfigError, from_dict
from lss_jax.models import Model, Params, build_model
from lss_jax.storage.workdir import IMPORTED, saved_config
from lss_jax.training.compatibility import check_fit, shapes_of
from lss_jax.training.evaluation import restore_params
from lss_jax.training.imported import imported_params


def check_start(config: Config, workdir: Path) -> None:
    """Refuses a run in `start_from` whose parameters are not those of this config, adapters apart.

    Raises:
      ConfigError: there is no run, or it has other parameters; one line per key that shapes them.
    """
    if not config.start_from:
        return
    if (workdir / IMPORTED).exists():
        raise ConfigError(
            f"start_from={config.start_from!r} has no use in workdir {workdir}, which was imported and starts from "
            f"that; choose another --workdir, or leave it empty"
        )
    saved = from_dict(saved_config(Path(config.start_from)))
    check_fit(
        saved,
        _with_adapters_of(saved, config),
        shapes_of,
        run=f"start_from={config.start_from!r} is a run",
        what="parameters",
        remedy="start from another run, or",
    )


def params_to_start_from(config: Config, workdir: Path, model: Model, mesh: Mesh) -> Params:
    """The parameters that a run in `workdir` does not make anew, placed on this mesh: all, all but adapters, or none.

    They are what it was imported with, or the newest ones of the run in `start_from`.

    Raises:
      ConfigError: that run has no sound checkpoint, or what was imported is damaged.
    """
    if not config.start_from:
        return imported_params(model, mesh, workdir)
    folder = Path(config.start_from)
    theirs = build_model(_with_adapters_of(from_dict(saved_config(folder)), config), mesh)
    return restore_params(theirs, mesh, folder)[1]


def _with_adapters_of(saved: Config, config: Config) -> Config:
    """The config of the parameters that another run is to give: without adapters, if it has none."""
    if saved.lora.rank:
        return config
    nothing_frozen = dataclasses.replace(config.optim, frozen="")  # a pattern might be for adapters alone
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0), optim=nothing_frozen)
