"""The suite runs on 8 simulated CPU devices, and fails without them."""

import os
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if (
    "PYTEST_XDIST_WORKER" not in os.environ
):  # equal programs are compiled once, by all workers and subprocesses together
    COMPILED = tempfile.TemporaryDirectory(prefix="lss_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
COMPILE_FAST = "--xla_backend_optimization_level=0"  # small programs, many: compiling is the cost
if version("jaxlib").startswith("0.10."):  # later ones do not know this flag, which takes compiling to a third
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", COMPILE_FAST)

import jax
import pytest

from lss_jax.runtime import distributed

distributed.start()


@pytest.fixture(autouse=True, scope="module")
def few_programs_at_a_time():
    """A program on 8 devices takes some 150 of the 65,530 memory maps that Linux gives to a process."""
    yield
    jax.clear_caches()


@pytest.fixture
def strict_ranks():
    """Users may forbid that JAX adds leading axes on its own."""
    with jax.numpy_rank_promotion("raise"):
        yield


def pytest_sessionstart(session):
    count = len(jax.devices())
    assert count >= 8, f"the tests need 8 simulated devices, {count} found; unset XLA_FLAGS and JAX_NUM_CPU_DEVICES"
