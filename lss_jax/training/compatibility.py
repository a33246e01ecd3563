"""Whether the checkpoints of a run fit the model of a new config."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lss_jax.config.schema import Config, ConfigError, changes, from_dict, with_value
from lss_jax.models import Params, build_model
from lss_jax.storage.workdir import saved_config
from lss_jax.training.optimizer import make_optimizer


def check_workdir(
    config: Config, workdir: Path, *, trains: bool = True, saved_steps: bool = True
) -> dict[str, tuple[Any, Any]]:
    """Refuses a config that the run's checkpoints do not fit; returns what else differs, key to (then, now).

    Moments must fit only where the run trains on. Where no step is saved yet, there are neither moments nor adapters.

    Raises:
      ConfigError: there is no run in `workdir`, or its parameters have other shapes; one line per key that shapes them.
    """
    saved = from_dict(saved_config(workdir))
    fixed = saved if saved_steps else dataclasses.replace(saved, lora=config.lora)
    for what, shapes in (("parameters", shapes_of), *([("moments", moments_of)] if trains and saved_steps else [])):
        misfits = shaping(fixed, config, shapes)
        if misfits:
            raise ConfigError(
                "\n".join(
                    f"workdir {workdir} holds a run with {key}={then!r}, not {now!r}, and its {what} do not fit; "
                    f"choose another --workdir, or go on with --config.{key}={then}"
                    for key, (then, now) in misfits.items()
                )
            )
    return changes(saved, config)


def shaping(saved: Config, config: Config, shapes: Callable[[Config], Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that give the two configs different `shapes`, each to (then, now); empty if shapes are equal.

    A key counts if changing it alone, from its saved value to the new one, changes shapes or leaves no valid model. If
    only several keys together do that, all that differ count.
    """
    differing = changes(saved, config)
    if not differing:
        return {}
    before = shapes(saved)
    if shapes(config) == before:
        return {}
    alone = {key: pair for key, pair in differing.items() if shapes(with_value(saved, key, pair[1])) != before}
    return alone or differing


def shapes_of(config: Config) -> Params | None:
    """The parameters' global shapes and dtypes (nothing is allocated), None if no model can be built of this config."""
    try:
        return build_model(config).natural_shapes
    except (ValueError, TypeError, ArithmeticError):  # sizes that no rule has checked yet
        return None


def moments_of(config: Config) -> Any:
    """The optimizer state's global shapes and dtypes, None if no optimizer can be made of this config."""
    try:
        model = build_model(config)
        return jax.eval_shape(make_optimizer(config.optim).init, model.only_trained(model.natural_shapes))
    except (ValueError, TypeError, ArithmeticError):  # as above
        return None
