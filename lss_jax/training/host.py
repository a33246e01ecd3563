"""What a run keeps in the memory of its hosts, and whether they have as much."""

import math
import os
from typing import Any

import jax
from jax.sharding import Mesh

from lss_jax.config.schema import Config, ConfigError
from lss_jax.config.units import shown_size
from lss_jax.models.recompute import waiting
from lss_jax.parallel.host_memory import HOST
from lss_jax.parallel.mesh import has_host_memory


def in_host_memory(config: Config, mesh: Mesh, state: Any) -> dict[str, int]:
    """Bytes per device by what they are: layers' inputs, and of `state` (shapes and shardings) with its gradient."""
    found = {}
    if config.model.remat == "offload":
        found["layers' inputs"] = waiting(config, mesh)
    if config.optim.offload:
        found["weights, gradients and moments"] = _bytes(state) + _bytes(state.params)
    return found


def check_hosts(config: Config, mesh: Mesh, state: Any) -> None:
    """Checks that this process's host can have what is to be in its memory.

    Raises:
      ConfigError: its devices reach no such memory, or there is not as much.
    """
    wanted = in_host_memory(config, mesh, state)
    if not wanted or not has_host_memory(mesh):
        return
    here, keys = mesh.local_devices, [f"{key}={value!r}" for key, value in _keys(config).items()]
    if HOST not in {memory.kind for memory in here[0].addressable_memories()}:
        raise ConfigError(
            f"{', '.join(keys)}: {here[0].device_kind} devices cannot reach the host's memory; "
            f'use optim.offload=False and model.remat="block"'
        )
    needed, there = len(here) * sum(wanted.values()), _physical_memory()
    if needed > there:
        raise ConfigError(
            f"{', '.join(keys)}: {shown_size(needed)} for the {len(here)} devices of this host, which has "
            f"{shown_size(there)} of memory; use more hosts, a larger model.remat_every, or a shorter data.seq_len"
        )


def _keys(config: Config) -> dict[str, Any]:
    used = {"model.remat": config.model.remat, "optim.offload": config.optim.offload}
    return {key: value for key, value in used.items() if value in ("offload", True)}


def _bytes(arrays: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if leaf.sharding.memory_kind == HOST]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
