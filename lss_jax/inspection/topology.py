"""The devices of a topology: those at hand, simulated ones, or ones to compile for that are not there.

A topology is written `cpu:8`, `tpu:v5p:2x2x2` (generation, chips along each link) or `gpu:h100:16` (eight to a host).
What is compiled for absent devices can be looked at in every detail, and not be run.
"""

import contextlib
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from lss_jax.config.schema import ConfigError

# What XLA must know of a GPU to compile for it; what is written out here the cards have in common. Source: NVIDIA's
# data sheets, and the CUDA C++ Programming Guide (technical specifications per compute capability).
GPU = """
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_optin} shared_memory_per_core: {shared}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock} l2_cache_size: {l2}
      memory_bandwidth: {bandwidth} device_memory_size: 85899345920
      cuda_compute_capability {{ major: {capability} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 13 }}
    device_description_str: "{name}"
"""
GPUS: dict[str, dict[str, int | float | str]] = {
    "h100": {
        **{"name": "NVIDIA H100 80GB HBM3", "capability": 9, "cores": 132, "fpus": 128, "clock": 1.98},
        **{"shared": 233472, "shared_optin": 232448, "l2": 52428800, "bandwidth": 3352320000000},
    },
    "a100": {
        **{"name": "NVIDIA A100-SXM4-80GB", "capability": 8, "cores": 108, "fpus": 64, "clock": 1.41},
        **{"shared": 167936, "shared_optin": 166912, "l2": 41943040, "bandwidth": 2039000000000},
    },
}
GPUS_PER_HOST = 8
TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # generations, and along how many axes their chips are linked
FORMS = "cpu:8, tpu:v5p:2x2x2, gpu:h100:16"


# Memory of a device. Source: Google Cloud's pages on TPU v4, v5e, v5p and v6e; the cards' data sheets.
CAPACITY = {
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
    "NVIDIA H100": 80,
    "NVIDIA A100": 80,
}  # GiB


def capacity_of(device: jax.Device) -> int | None:
    """Bytes of a device's own memory, None if that is not known."""
    for kind, size in sorted(CAPACITY.items(), reverse=True):  # the longer name first
        if device.device_kind.startswith(kind):
            return size * 2**30
    return None


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, to make a mesh of; call it before anything asks JAX for a device.

    Raises:
      ConfigError: there is no such topology, or nothing is installed that can compile for it.
    """
    kind, _, rest = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", rest):
        return _simulated(int(rest))
    generation, _, size = rest.partition(":")
    if kind == "tpu" and generation in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        if size.count("x") + 1 == TPUS[generation]:
            return _absent_tpus(topology, f"{generation}:{size}")
        raise ConfigError(
            f"topology {topology!r}: chips of TPU {generation} are linked along {TPUS[generation]} axes; "
            f"write {'x'.join(['4'] * TPUS[generation])}, for example"
        )
    if kind == "gpu" and generation in GPUS and re.fullmatch(r"[1-9]\d*", size):
        return _absent_gpus(topology, generation, int(size))
    raise ConfigError(
        f"topology {topology!r} is unknown; write it like {FORMS}, with a TPU of {', '.join(TPUS)} or a GPU of "
        f"{', '.join(GPUS)}"
    )


def _simulated(count: int) -> Sequence[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has found its devices already
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ConfigError(f"topology cpu:{count}: this process simulates {len(devices)} devices already")
    return devices[:count]


def _absent_tpus(topology: str, name: str) -> Sequence[jax.Device]:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask the metadata server of a cloud machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody uses a TPU: several processes may compile
    return _absent(topology, "tpu", topology_name=name)


def _absent_gpus(topology: str, name: str, count: int) -> Sequence[jax.Device]:
    per_host = min(count, GPUS_PER_HOST)
    if count % per_host:
        raise ConfigError(f"topology {topology!r}: {count} is not a multiple of {per_host} GPUs to a host")
    return _absent(
        topology, "cuda", target_config=GPU.format(**GPUS[name]), topology=f"1x{count // per_host}x{per_host}"
    )


def _absent(written: str, platform: str, **description: str) -> Sequence[jax.Device]:
    jax.config.update("jax_platforms", "cpu")  # constants are made here
    try:
        return topologies.get_topology_desc(platform=platform, **description).devices
    except Exception as error:  # whatever a plugin, or its absence, raises
        reason = str(error).splitlines()[0]
        remedy = 'pip install "{}" brings what compiles for it'.format(
            {"tpu": "jax[tpu]", "cuda": "jax[cuda13]"}[platform]
        )
        if "INVALID_ARGUMENT" in reason:
            remedy = "use a size that whole hosts make up, mostly of 2x2 chips"
        raise ConfigError(f"topology {written!r}: {reason}; {remedy}") from error
