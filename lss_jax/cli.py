"""What the command lines share: the config from a file or a run, overrides, and errors as one line and exit code 2."""

import argparse
import functools
import logging
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from lss_jax.config.schema import Config, ConfigError, RunError, flat, from_dict, gather_problems, unknown_key
from lss_jax.runtime import distributed
from lss_jax.runtime.distributed import Launch
from lss_jax.runtime.peers import Alone, Peers
from lss_jax.storage.workdir import saved_config

BAD_INPUT = 2
FAILED = 3  # the run cannot go on; peers.LOST is the code where another process is why
OVERRIDES = "Any key of the config can be changed by --config.KEY=VALUE, as in --config.optim.steps=1000."


def run(main: Callable[[], int]) -> None:
    """Ends the process with the exit code of `main`; what a user can mend is one line per problem.

    A mistake in the input is exit code 2, a run that had to be stopped 3.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)  # libraries' warnings, and errors that they raise as well
    sys.unraisablehook = lambda _: None  # TensorStore prints there, too, what its failed writes raise in our thread
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and Orbax's event loop, what they raise in its tasks
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("lss_jax").addHandler(handler)
    logging.getLogger("lss_jax").propagate = False
    try:
        sys.exit(main())
    except (ConfigError, RunError) as error:
        for problem in str(error).split("\n"):
            print(f"error: {problem}", file=sys.stderr)
        _end(BAD_INPUT if isinstance(error, ConfigError) else FAILED)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint, if any, is intact", file=sys.stderr)
        _end(128 + signal.SIGINT)


def _end(code: int) -> NoReturn:
    """Ends the process after an error; if it is one of many without JAX's own farewell, which waits for all of them."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Adds the options that make this process one of many where no launcher says so."""
    group = parser.add_argument_group(
        "many processes", "started by Slurm, Open MPI, Kubernetes or on Cloud TPU they find one another; elsewhere:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, and a free port there")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="the number of this one, from 0")


def start(arguments: argparse.Namespace, config: Config) -> Alone | Peers:
    """Joins the other processes, if any; process 0 alone gives warnings."""
    launch = Launch(arguments.coordinator, arguments.processes, arguments.process, config.heartbeat_timeout)
    peers = distributed.start(launch)
    if not distributed.is_first():
        logging.getLogger("lss_jax").setLevel(logging.ERROR)
    return peers


def parse(
    parser: argparse.ArgumentParser, load: Callable[[argparse.Namespace], ConfigDict]
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses `sys.argv`: the parser's own options, and overrides of the config that `load` finds by them."""
    arguments, overrides = parser.parse_known_args()
    return arguments, override(load(arguments), overrides)


def load_config(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a Python file such as `configs/default.py`, or of a run's folder, with some keys changed.

    >>> load_config("configs/default.py", {"mesh.seq": 4, "optim.steps": 1000}).optim.steps
    1000

    Args:
      path: a file with a function `get_config`, or the workdir of a run.
      overrides: new values by their dotted keys, which `configs/base.py` lists.

    Raises:
      ConfigError: no such file, folder or key, or a value that cannot be; a line per problem. What the devices must
        allow is checked where they are known.
    """
    file = Path(path)
    config = ConfigDict(saved_config(file)) if file.is_dir() else load_config_file(str(path))
    gather_problems(*(functools.partial(_set, config, key, value) for key, value in (overrides or {}).items()))
    return from_dict(config)


def _set(config: ConfigDict, key: str, value: Any) -> None:
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


def load_config_file(path: str) -> ConfigDict:
    """The config of a Python file with a function `get_config`.

    Raises:
      ConfigError: no such file or function, or the file itself fails.
    """
    if not Path(path).is_file():
        known = ", ".join(sorted(map(str, Path("configs").glob("*.py")))) or "none in ./configs"
        raise ConfigError(f"--config={path} is not a file; give a config file (here: {known})")
    try:
        with _found(Path(path).resolve().parents[1]):
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
def _found(folder: Path) -> Iterator[None]:
    """Config files import one another as `configs.NAME`: in the block that is found from wherever this runs."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Applies `--config.KEY=VALUE` arguments; values are parsed by the type of the default.

    Raises:
      ConfigError: an unknown key or argument, or a value that does not parse.
    """
    gather_problems(*(functools.partial(_override_one, config, argument) for argument in arguments))
    return config


def _override_one(config: ConfigDict, argument: str) -> None:
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
