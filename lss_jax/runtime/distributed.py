"""Process start-up, alone or as one of many, and what the processes of a run tell one another outside of XLA."""

import os
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lss_jax.config.schema import ConfigError
from lss_jax.runtime.peers import Alone, Peers, leave

SIMULATED_DEVICES = 8
COLLECTIVE_TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"


class Launch(NamedTuple):
    """How this process is started; None where the launcher (Slurm, Open MPI, Kubernetes, Cloud TPU) says it, if any."""

    coordinator: str | None  # HOST:PORT that process 0 listens at
    processes: int | None
    process: int | None
    heartbeat_timeout: int  # seconds


def start(launch: Launch | None = None) -> Alone | Peers:
    """Readies this process and finds the run's devices and other processes; call it before JAX is asked for a device.

    Without an accelerator each process runs on 8 simulated CPU devices, unless the user says how many in `XLA_FLAGS` or
    `JAX_NUM_CPU_DEVICES`. Simulated devices take turns on the real cores, so the last one may come to a collective
    long after the first: XLA's limit of 40 s, after which it aborts, is raised to 20 minutes.

    Raises:
      ConfigError: JAX finds no devices of the kind that `JAX_PLATFORMS` asks for, or the launch is not well described.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)
    if COLLECTIVE_TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {COLLECTIVE_TIMEOUT}=1200".strip()
    many = launch is not None and _join(launch)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no devices ({reason}); install JAX for them, or set JAX_PLATFORMS=cpu") from error
    if launch is None or not many or jax.process_count() == 1:
        return Alone()
    return Peers(_client(), jax.process_index(), jax.process_count(), launch.heartbeat_timeout)


def _join(launch: Launch) -> bool:
    """Joins the other processes; False if there is no word of any."""
    _check(launch)
    timeout = 5 * launch.heartbeat_timeout
    late = threading.Timer(timeout - 2, leave, (f"not all processes of the run came together within {timeout} s",))
    late.daemon = True
    late.start()  # a little earlier than JAX, which then aborts the process
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=2 * launch.heartbeat_timeout,  # JAX then aborts; our peers are to say it first
        )
    except ValueError as error:
        if launch.coordinator is None and "coordinator_address should be defined" in str(error):
            return False
        raise ConfigError(f"the launcher's description of this run cannot be read ({error})") from error
    finally:
        late.cancel()
    return True


def _check(launch: Launch) -> None:
    coordinator, processes, process, _ = launch
    given = f"--coordinator={coordinator} --processes={processes} --process={process}"
    if (coordinator, processes, process) == (None, None, None):
        return
    if coordinator is None or processes is None or process is None:
        raise ConfigError(f"{given}: give all three, or none to be found by the launcher")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise ConfigError(f"{given}: --coordinator must be HOST:PORT, with a port from 1 to 65535")
    if not 0 <= process < processes:
        raise ConfigError(f"{given}: --process must be at least 0 and less than --processes")
    if process == 0:
        _check_free(int(port), given)


def _check_free(port: int, given: str) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise ConfigError(f"{given}: port {port} cannot be listened at ({error.strerror}); choose another") from error


def _client() -> Any:
    from jax._src import distributed  # the key-value store has no public name yet

    return distributed.global_state.client


def is_first() -> bool:
    """Whether this is process 0, which alone writes what is not an array."""
    return jax.process_index() == 0


def all_agree(value: bool) -> bool:
    """Whether it is true in every process; all must ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def from_first(number: int) -> int:
    """The number of process 0 (int32); all must ask."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def after_first(action: Callable[[], None]) -> None:
    """Does it in process 0 alone, and has the others wait for it."""
    if is_first():
        action()
    multihost_utils.sync_global_devices("after process 0")
