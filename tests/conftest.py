"""The suite runs on 8 simulated CPU devices, and fails without them."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from lss_jax import distributed

distributed.start()


def pytest_sessionstart(session):
    count = len(jax.devices())
    assert count >= 8, f"the tests need 8 simulated devices, {count} found; unset XLA_FLAGS and JAX_NUM_CPU_DEVICES"
