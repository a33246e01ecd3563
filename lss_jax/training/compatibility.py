"""Whether the checkpoints of a run fit the model of a new config."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lss_jax.attention.strategies import STRATEGIES
from lss_jax.config.schema import Config, ConfigError, changes, from_dict, with_value
from lss_jax.models import Params, build_model
from lss_jax.storage.workdir import saved_config
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.state import moments_like


def check_workdir(
    config: Config, workdir: Path, *, trains: bool = True, saved_steps: bool = True
) -> dict[str, tuple[Any, Any]]:
    """Refuses a config that the run's checkpoints do not fit; returns what else differs, key to (then, now).

    Moments must fit only where the run trains on. Where no step is saved yet, there are neither moments nor adapters.

    Raises:
      ConfigError: there is no run in `workdir`, or its parameters have other shapes, or are of another model; one line
        per key that shapes them, or decides what they mean.
    """
    saved = from_dict(saved_config(workdir))
    fixed = saved if saved_steps else dataclasses.replace(saved, lora=config.lora)
    run, remedy = f"workdir {workdir} holds a run", "choose another --workdir, or go on"
    check_fit(fixed, config, shapes_of, run=run, what="parameters", remedy=remedy)
    if saved_steps:
        _check_meaning(saved, config, run, remedy)
    if trains and saved_steps:
        check_fit(fixed, config, moments_of, run=run, what="moments", remedy=remedy)
    return changes(saved, config)


def _check_meaning(saved: Config, config: Config, run: str, remedy: str) -> None:
    """Raises a ConfigError if attention that is not exact would be another than that of the saved config."""
    strategies = [STRATEGIES[one.attention.strategy] for one in (saved, config)]
    if all(strategy.exact for strategy in strategies):
        return  # one stands in for the other
    differing = changes(saved, config)
    deciding = {"attention.strategy", *strategies[0].defined_by}
    lines = [
        f"{run} with {key}={then!r}, not {now!r}, which is another model; {remedy} with --config.{key}={then}"
        for key, (then, now) in differing.items()
        if key in deciding
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def check_fit(
    saved: Config, config: Config, shapes: Callable[[Config], Any], *, run: str, what: str, remedy: str
) -> None:
    """Raises a ConfigError if the configs have different `shapes`, with a line per key that makes the difference."""
    misfits = shaping(saved, config, shapes)
    if misfits:
        raise ConfigError(
            "\n".join(
                f"{run} with {key}={then!r}, not {now!r}, and its {what} do not fit; "
                f"{remedy} with --config.{key}={then}"
                for key, (then, now) in misfits.items()
            )
        )


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
        return moments_like(make_optimizer(config.optim), model, model.natural_shapes)
    except (ValueError, TypeError, ArithmeticError):  # as above
        return None
