"""Process start-up: what has to be set before JAX looks for devices."""

import os

import jax

from lss_jax.config import ConfigError

SIMULATED_DEVICES = 8
COLLECTIVE_TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"


def start() -> None:
    """Readies this process and finds its devices; call it before anything asks JAX for a device.

    Without an accelerator the program runs on 8 simulated CPU devices, unless the user says how many in `XLA_FLAGS` or
    `JAX_NUM_CPU_DEVICES`. Simulated devices take turns on the real cores, so the last one may come to a collective
    long after the first: XLA's limit of 40 s, after which it aborts, is raised to 20 minutes.

    Raises:
      ConfigError: JAX finds no devices of the kind that `JAX_PLATFORMS` asks for.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)
    if COLLECTIVE_TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {COLLECTIVE_TIMEOUT}=1200".strip()
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no devices ({reason}); install JAX for them, or set JAX_PLATFORMS=cpu") from error
