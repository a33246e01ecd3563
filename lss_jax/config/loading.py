"""Configs from Python files, and changes to single keys, as `--config.KEY=VALUE` arguments or as a mapping."""

import functools
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lss_jax.config.schema import ConfigError, flat, gather_problems, unknown_key

OVERRIDES = "Any key of the config can be changed by --config.KEY=VALUE, as in --config.optim.steps=1000."


def load_config_file(path: str) -> ConfigDict:
    """The config of a Python file with a function `get_config`.

    Raises:
      ConfigError: no such file or function, or the file itself fails.
    """
    if not Path(path).is_file():
        known = ", ".join(sorted(map(str, Path("configs").glob("*.py")))) or "none in ./configs"
        raise ConfigError(f"--config={path} is not a file; give a config file (here: {known})")
    try:
        with _importable(Path(path).resolve().parents[1]):
            config = runpy.run_path(path)["get_config"]()
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config() returns {type(config).__name__}")
        return config
    except Exception as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(
            f"--config={path} fails with {type(error).__name__}: {reason}; it needs a function get_config() that "
            f"returns the ConfigDict of configs/base.py, changed"
        ) from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Makes packages in `folder` importable: config files import one another as `configs.NAME`, from anywhere."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def set_keys(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Changes values in place, by their dotted keys.

    Raises:
      ConfigError: an unknown key, or a value of another type than the default; one line per problem.
    """
    gather_problems(*(functools.partial(_set_key, config, key, value) for key, value in values.items()))


def _set_key(config: ConfigDict, key: str, value: Any) -> None:
    known = list(flat(config))
    if key not in known:
        raise ConfigError(unknown_key(key, known))
    try:
        config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as error:
        default = flat(config)[key]
        raise ConfigError(
            f"{key}={value!r} is of type {type(value).__name__}; give a value of type {type(default).__name__}"
        ) from error


def override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Applies `--config.KEY=VALUE` arguments; values are parsed by the type of the default.

    Raises:
      ConfigError: an unknown key or argument, or a value that does not parse; one line per problem.
    """
    gather_problems(*(functools.partial(_override_key, config, argument) for argument in arguments))
    return config


def _override_key(config: ConfigDict, argument: str) -> None:
    known = list(flat(config))
    match = re.fullmatch(r"--config\.([^=]+)=.*", argument, re.DOTALL)
    if not match:
        raise ConfigError(f"unknown argument {argument!r}; see --help. {OVERRIDES}")
    if match[1] not in known:
        raise ConfigError(unknown_key(match[1], known))
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[argument])
    try:
        values(["", argument])
    except (flags.Error, ValueError, TypeError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"{reason}; give a value of the same type as the default in configs/base.py") from error
