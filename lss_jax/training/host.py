"""What a run keeps in the memory of its hosts, and whether they have as much."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lss_jax.config.schema import Config, ConfigError
from lss_jax.config.units import shown_size
from lss_jax.models import FAMILIES, Model
from lss_jax.models.recompute import waiting
from lss_jax.parallel.host_memory import HOST
from lss_jax.parallel.mesh import has_host_memory, shard_bytes
from lss_jax.runtime.distributed import all_agree

INSTEAD = {"model.remat": "block", "optim.offload": False}
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes; or "max"


def host_bytes(model: Model, mesh: Mesh, state: Any) -> dict[str, int]:
    """Bytes per device by what they are: layers' inputs, and of `state` (shapes and shardings) with its gradient."""
    config, found = model.config, {}
    if config.model.remat == "offload":
        sequences = FAMILIES[config.model.family].sequences
        found["layers' inputs"] = sum(waiting(config, mesh, sequence) for sequence in sequences)
    if config.optim.offload:
        gradients = 1 if config.optim.accumulate == 1 else 2  # the sum, and a microbatch's
        found["weights, gradients and moments"] = _bytes(state) + gradients * _bytes(model.only_trained(state.params))
    return found


def check_hosts(model: Model, mesh: Mesh, state: Any) -> None:
    """Checks that the hosts can have what is to be in their memory; every process must ask.

    Raises:
      ConfigError: the devices reach no such memory, or there is not as much.
    """
    config, wanted = model.config, host_bytes(model, mesh, state)
    if not wanted or not has_host_memory(mesh):
        return
    here, there = mesh.local_devices, memory_of_this_host()
    keys = " and ".join(f"{key}={value!r}" for key, value in _keys(config).items())
    if HOST not in {memory.kind for memory in here[0].addressable_memories()}:
        without = " and ".join(f"{key}={INSTEAD[key]!r}" for key in _keys(config))
        raise ConfigError(f"{keys}: {here[0].device_kind} devices cannot reach the host's memory; use {without}")
    needed = len(here) * sum(wanted.values())
    if not all_agree(needed <= there):
        parts = ", ".join(f"{shown_size(size)} of {what}" for what, size in wanted.items())
        raise ConfigError(
            f"{keys} asks each of the {len(here)} devices of a process for {parts}, {shown_size(needed)} in all; this "
            f"host has {shown_size(there)} of memory, or that of another process has less than it needs; use more "
            f"hosts, or {' or '.join(_remedies(config))}"
        )


def memory_of_this_host() -> int:
    """Bytes of memory that this machine has, or that its container may use."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        return min(physical, int(LIMIT.read_text()))
    return physical


def _keys(config: Config) -> dict[str, Any]:
    used = {"model.remat": config.model.remat, "optim.offload": config.optim.offload}
    return {key: value for key, value in used.items() if value in ("offload", True)}


def _remedies(config: Config) -> list[str]:
    inputs = ["a larger model.remat_every", "a shorter data.seq_len"] if config.model.remat == "offload" else []
    narrow = config.optim.offload and config.optim.moments_dtype != "bfloat16"
    return [*inputs, *['optim.moments_dtype="bfloat16"'] * narrow, *["optim.offload=False"] * config.optim.offload]


def _bytes(arrays: Any) -> int:
    """Bytes per device of those arrays that rest in the host's memory."""
    leaves = jax.tree.leaves(arrays)
    return sum(shard_bytes(leaf, leaf.sharding) for leaf in leaves if leaf.sharding.memory_kind == HOST)
