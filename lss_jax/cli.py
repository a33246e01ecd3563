"""Shared by the commands: exit codes, errors as one line per problem, launch options, and the config of a command."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import logging as absl_logging
from ml_collections import ConfigDict

from lss_jax.config.loading import OVERRIDES as OVERRIDES
from lss_jax.config.loading import load_config_file, override
from lss_jax.config.schema import Config, ConfigError, RunError, from_dict
from lss_jax.runtime import distributed
from lss_jax.runtime.distributed import Launch
from lss_jax.runtime.peers import Alone, Peers
from lss_jax.storage.workdir import saved_config

BAD_INPUT = 2
FAILED = 3  # the run cannot go on; peers.LOST is the code where another process is the cause


def run(main: Callable[[], int]) -> None:
    """Ends the process with the exit code of `main`; errors that a user can fix are printed, one line per problem.

    A ConfigError is exit code 2, a RunError 3.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)  # warnings of libraries, and errors that they raise as well
    sys.unraisablehook = lambda _: None  # TensorStore reports there, too, a failed write that it raises in our thread
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and Orbax's event loop, what it raises in its tasks
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
    """Ends the process after an error; one of many skips JAX's own shutdown, which waits for all of them."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Adds the options that make this process one of many where no launcher does."""
    group = parser.add_argument_group(
        "many processes", "started by Slurm, Open MPI, Kubernetes or on Cloud TPU they find one another; elsewhere:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="the host of process 0, and a free port there")
    group.add_argument("--processes", type=int, metavar="N", help="the number of processes")
    group.add_argument("--process", type=int, metavar="I", help="the number of this one, from 0")


def start(arguments: argparse.Namespace, config: Config) -> Alone | Peers:
    """Joins the other processes, if any; process 0 alone logs warnings."""
    launch = Launch(arguments.coordinator, arguments.processes, arguments.process, config.heartbeat_timeout)
    peers = distributed.start(launch)
    if not distributed.is_first():
        logging.getLogger("lss_jax").setLevel(logging.ERROR)
    return peers


def parse(
    parser: argparse.ArgumentParser, load: Callable[[argparse.Namespace], ConfigDict]
) -> tuple[argparse.Namespace, Config]:
    """Parses `sys.argv`: the parser's own options, and `--config.KEY=VALUE` overrides of the config that `load` finds.

    Raises:
      ConfigError: an unknown argument, or the config cannot be loaded or changed in this way.
    """
    arguments, overrides = parser.parse_known_args()
    return arguments, from_dict(override(load(arguments), overrides))


def config_of_file(arguments: argparse.Namespace) -> ConfigDict:
    """Loads the config of `--config FILE`."""
    return load_config_file(arguments.config)


def config_of_run(arguments: argparse.Namespace) -> ConfigDict:
    """Loads the config of the run in `--workdir DIR`."""
    return ConfigDict(saved_config(Path(arguments.workdir)))
