"""What the command lines share: the config from a file or a run, overrides, and errors as one line and exit code 2."""

import argparse
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from lss_jax.config import ConfigError, flat, unknown_key

BAD_INPUT = 2
OVERRIDES = "Any key of the config can be changed by --config.KEY=VALUE, as in --config.optim.steps=1000."


def run(main: Callable[[], int]) -> None:
    """Ends the process with the exit code of `main`; a user's mistake is one line per problem and exit code 2."""
    logging.set_verbosity(logging.ERROR)  # libraries' warnings about their own affairs
    try:
        sys.exit(main())
    except ConfigError as error:
        for problem in str(error).split("\n"):
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint, if any, is intact", file=sys.stderr)
        sys.exit(130)


def parse(
    parser: argparse.ArgumentParser, load: Callable[[argparse.Namespace], ConfigDict]
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses `sys.argv`: the parser's own options, and overrides of the config that `load` finds by them."""
    arguments, overrides = parser.parse_known_args()
    return arguments, override(load(arguments), overrides)


def load_config_file(path: str) -> ConfigDict:
    """The config of a Python file with a function `get_config`.

    Raises:
      ConfigError: no such file or function, or the file itself fails.
    """
    if not Path(path).is_file():
        known = ", ".join(sorted(map(str, Path("configs").glob("*.py")))) or "none in ./configs"
        raise ConfigError(f"--config={path} is not a file; give a config file (here: {known})")
    try:
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


def override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Applies `--config.KEY=VALUE` arguments; values are parsed by the type of the default.

    Raises:
      ConfigError: an unknown key or argument, or a value that does not parse.
    """
    known = list(flat(config))
    for argument in arguments:
        match = re.fullmatch(r"--config\.([^=]+)=.*", argument, re.DOTALL)
        if not match:
            raise ConfigError(f"unknown argument {argument!r}; see --help. {OVERRIDES}")
        if match[1] not in known:
            raise ConfigError(unknown_key(match[1], known))
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(["", *arguments])
    except (flags.Error, ValueError, TypeError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"{reason}; give a value of the same type as the default in configs/base.py") from error
    return values["config"].value
