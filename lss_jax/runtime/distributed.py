"""Process start-up, alone or as one of many, and agreement between the processes of a run."""

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
    """How this process is launched; None where the launcher, if any, provides it (Slurm, Open MPI, Kubernetes, TPU)."""

    coordinator: str | None  # HOST:PORT where process 0 listens
    processes: int | None
    process: int | None
    heartbeat_timeout: int  # seconds


def start(launch: Launch | None = None) -> Alone | Peers:
    """Initializes this process and finds the run's devices and other processes; call it before JAX finds devices.

    Without an accelerator each process runs on 8 simulated CPU devices, unless `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES`
    sets another number.

    Raises:
      ConfigError: JAX finds no devices of the kind that `JAX_PLATFORMS` asks for, or the launch options are invalid.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)
    _wait_for_slow_collectives()
    many = launch is not None and _join(launch)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no devices ({reason}); install JAX for them, or set JAX_PLATFORMS=cpu") from error
    if launch is None or not many or jax.process_count() == 1:
        return Alone()
    return Peers(_client(), jax.process_index(), jax.process_count(), launch.heartbeat_timeout)


def start_on_cpu(devices: int) -> None:
    """Initializes this process to compile for other devices: it uses the CPU alone, as `devices` simulated devices.

    Accelerators of this machine are left alone, and constants of traced programs lie on the CPU. Call it before JAX
    finds devices.

    Raises:
      RuntimeError: JAX has found another number of simulated devices already.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_platforms", "cpu")
    _wait_for_slow_collectives()


def _wait_for_slow_collectives() -> None:
    """Raises XLA's limit for collectives on CPU from 40 s to 20 minutes, unless the user has set it.

    Simulated devices share the real cores, so the last one may reach a collective long after the first.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if COLLECTIVE_TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {COLLECTIVE_TIMEOUT}=1200".strip()


def _join(launch: Launch) -> bool:
    """Joins the other processes; returns False if neither the options nor a launcher name any."""
    _check(launch)
    timeout = 5 * launch.heartbeat_timeout
    late = threading.Timer(timeout - 2, leave, (f"not all processes of the run came together within {timeout} s",))
    late.daemon = True
    late.start()  # a little earlier than JAX, which then aborts the process
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=2 * launch.heartbeat_timeout,  # JAX then aborts; Peers reports it first
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
    """Whether this is process 0, the only one that writes files other than arrays."""
    return jax.process_index() == 0


def all_agree(value: bool) -> bool:
    """Whether `value` is true in every process; all processes must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def from_first(number: int) -> int:
    """The `number` that process 0 has (int32); all processes must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def after_first(action: Callable[[], None]) -> None:
    """Runs `action` in process 0 alone, while the others wait; all processes must call it."""
    if is_first():
        action()
    multihost_utils.sync_global_devices("after process 0")
