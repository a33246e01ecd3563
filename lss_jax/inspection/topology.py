"""The devices of a topology: simulated ones, or TPUs and GPUs that this machine need not have, to compile for.

A topology is written `cpu:8`, `tpu:v5p:2x2x2` (generation, chips along each axis of the torus) or `gpu:h100:16` (eight
per host). A program compiled for absent devices can be inspected in every detail, but not run.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
from jax.experimental import topologies

from lss_jax.config.schema import ConfigError

# What XLA must know about a GPU to compile for it; the cards share the numbers written out here. Source: NVIDIA's data
# sheets, and the CUDA C++ Programming Guide (technical specifications per compute capability).
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
PACKAGES = {"tpu": "jax[tpu]", "cuda": "jax[cuda13]"}  # by the platform they compile for
TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # generations, and the number of axes of their torus
FORMS = "cpu:8, tpu:v5p:2x2x2, gpu:h100:16"
COUNT = re.compile(r"[1-9]\d*")
LIBTPU = {  # libtpu reads these when it is loaded
    "TPU_SKIP_MDS_QUERY": "1",  # it would ask the metadata server of a cloud machine
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used: several processes may compile
}

# Memory per device, GiB. Source: Google Cloud's pages on TPU v4, v5e, v5p and v6e; the cards' data sheets.
CAPACITY = {
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
    "NVIDIA H100": 80,
    "NVIDIA A100": 80,
}


def capacity_of(device: jax.Device) -> int | None:
    """Bytes of memory on a device, None if unknown."""
    for kind, size in sorted(CAPACITY.items(), reverse=True):  # longer names first
        if device.device_kind.startswith(kind):
            return size * 2**30
    return None


def cpu_devices_of(topology: str) -> int:
    """How many simulated devices a process must start with to compile for a topology: N for `cpu:N`, otherwise 1."""
    kind, _, count = topology.partition(":")
    return int(count) if kind == "cpu" and COUNT.fullmatch(count) else 1


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, to make a mesh of; `cpu:N` are the first N simulated devices of this process.

    It asks for descriptions alone. A command that compiles calls `runtime.distributed.start_on_cpu` first, so that JAX
    leaves the machine's accelerators alone.

    Raises:
      ConfigError: there is no such topology, nothing is installed that compiles for it, or this process simulates fewer
        devices.
    """
    kind, _, rest = topology.partition(":")
    if kind == "cpu" and COUNT.fullmatch(rest):
        return _simulated(topology, int(rest))
    generation, _, size = rest.partition(":")
    if kind == "tpu" and generation in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        if size.count("x") + 1 == TPUS[generation]:
            return _absent_tpus(topology, f"{generation}:{size}")
        raise ConfigError(
            f"topology {topology!r}: chips of TPU {generation} are linked along {TPUS[generation]} axes; "
            f"write {'x'.join(['4'] * TPUS[generation])}, for example"
        )
    if kind == "gpu" and generation in GPUS and COUNT.fullmatch(size):
        return _absent_gpus(topology, generation, int(size))
    raise ConfigError(
        f"topology {topology!r} is unknown; write it like {FORMS}, with a TPU of {', '.join(TPUS)} or a GPU of "
        f"{', '.join(GPUS)}"
    )


def _simulated(topology: str, count: int) -> Sequence[jax.Device]:
    try:
        devices = jax.devices("cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        devices = []
    if len(devices) < count:
        raise ConfigError(
            f"topology {topology!r}: this process simulates {len(devices)} devices; start it with "
            f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={count}"
        )
    return devices[:count]


def _absent_tpus(topology: str, name: str) -> Sequence[jax.Device]:
    with _environment(LIBTPU):
        return _absent(topology, "tpu", topology_name=name)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables inside the block, those that the user has not set."""
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _absent_gpus(topology: str, name: str, count: int) -> Sequence[jax.Device]:
    per_host = min(count, GPUS_PER_HOST)
    if count % per_host:
        raise ConfigError(f"topology {topology!r}: {count} is not a multiple of {per_host} GPUs per host")
    return _absent(
        topology, "cuda", target_config=GPU.format(**GPUS[name]), topology=f"1x{count // per_host}x{per_host}"
    )


def _absent(written: str, platform: str, **description: str) -> Sequence[jax.Device]:
    try:
        return topologies.get_topology_desc(platform=platform, **description).devices
    except Exception as error:  # whatever a plugin, or its absence, raises
        reason = str(error).splitlines()[0]
        remedy = f'install the compiler for it with pip install "{PACKAGES[platform]}"'
        if "INVALID_ARGUMENT" in reason:
            remedy = "use a size that is a multiple of whole hosts, mostly of 2x2 chips"
        raise ConfigError(f"topology {written!r}: {reason}; {remedy}") from error
