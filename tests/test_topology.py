"""Topologies that are not there, and which kernel is for which devices."""

import contextlib
import os
from types import SimpleNamespace

import jax
import pytest
from helpers import mesh_of, small_config

from lss_jax.attention.placement import kernel_on
from lss_jax.config.schema import ConfigError
from lss_jax.inspection.topology import cpu_devices_of, devices_of
from lss_jax.parallel.mesh import AXES


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("tpu", "'tpu' is unknown; write it like cpu:8"),
        ("tpu:v7:2x2", "with a TPU of v4, v5e, v5p, v6e or a GPU of h100, a100"),
        ("tpu:v5p:4x4", "are linked along 3 axes; write 4x4x4"),
        ("gpu:h100:none", "unknown"),
        ("gpu:h100:12", "12 is not a multiple of 8 GPUs per host"),
        ("cpu:0", "unknown"),
        ("cpu:4096", "this process simulates 8 devices; start it with JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4096"),
    ],
)
def test_an_impossible_topology_is_refused(topology, message):
    with pytest.raises(ConfigError, match=message):
        devices_of(topology)


def test_simulated_devices_are_those_at_hand():
    assert devices_of("cpu:3") == jax.devices()[:3]


@pytest.mark.parametrize("topology", ["cpu:3", "cpu:4096", "tpu:v5p:2x2x2", "gpu:h100:8"])
def test_asking_for_devices_leaves_the_process_as_it_is(topology):
    before = (jax.config.jax_platforms, jax.config.jax_num_cpu_devices, dict(os.environ))
    with contextlib.suppress(ConfigError):  # nothing may be installed that compiles for it
        devices_of(topology)
    assert (jax.config.jax_platforms, jax.config.jax_num_cpu_devices, dict(os.environ)) == before


def test_a_process_simulates_the_devices_of_a_topology_or_one():
    wanted = {"cpu:16": 16, "tpu:v5p:2x2x2": 1, "gpu:h100:8": 1, "cpu:no": 1}
    assert {topology: cpu_devices_of(topology) for topology in wanted} == wanted


def fake_mesh(**of_device) -> SimpleNamespace:
    """As far as the choice of a kernel looks at a mesh."""
    return SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(**of_device)]), shape=dict.fromkeys(AXES, 1))


H100 = fake_mesh(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
V100 = fake_mesh(platform="gpu", device_kind="Tesla V100", compute_capability="7.0")
MI300 = fake_mesh(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")
TPU = fake_mesh(platform="tpu", device_kind="TPU v5p")


@pytest.mark.parametrize(
    ("mesh", "strategy", "kernel"),
    [
        (H100, "lss", "triton"),
        (H100, "ulysses", "triton"),
        (H100, "ring", "blockwise"),
        (V100, "lss", "blockwise"),
        (MI300, "lss", "blockwise"),
        (TPU, "lss", "mosaic"),
    ],
)
def test_the_kernel_is_chosen_by_capability(mesh, strategy, kernel):
    assert kernel_on(small_config(attention__strategy=strategy).attention, mesh) == kernel


@pytest.mark.parametrize(
    ("mesh", "kernel", "message"),
    [
        (H100, "mosaic", "'mosaic' is for TPUs, and these devices are NVIDIA H100"),
        (V100, "triton", "'triton' is for NVIDIA GPUs of compute capability 8.0 or more, and these .* Tesla V100"),
        (mesh_of(1, 8), "triton", "these devices are cpu; use attention.kernel="),
    ],
)
def test_a_kernel_for_other_devices_is_refused(mesh, kernel, message):
    with pytest.raises(ConfigError, match=message):
        kernel_on(small_config(attention__kernel=kernel).attention, mesh)
