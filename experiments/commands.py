"""The project's commands, as experiments run them: each in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def on_cpu(devices: int) -> dict[str, str]:
    """The environment of a process with so many simulated devices."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def command(module: str, *arguments: object, devices: int) -> None:
    """Runs `python -m lss_jax.MODULE ARGUMENTS` on simulated devices."""
    words = [sys.executable, "-m", f"lss_jax.{module}", *map(str, arguments)]
    subprocess.run(words, env=on_cpu(devices), check=True)


def options(values: Mapping[str, Any]) -> list[str]:
    """The arguments that give config keys these values."""
    return [f"--config.{key}={value}" for key, value in values.items()]
