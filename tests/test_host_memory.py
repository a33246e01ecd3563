"""Arrays in the host's memory, slice by slice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lss_jax.parallel import host_memory
from lss_jax.parallel.host_memory import streamed, streamed_sum, to_host


@pytest.mark.parametrize("shape", [(7, 3, 4), (8, 4, 4), (2, 6, 50), (90, 1), (1, 1)])
def test_slices_cover_an_array_once(shape, monkeypatch):
    """With a rest, or of few rows, or of rows that are too large."""
    monkeypatch.setattr(host_memory, "SLICE", 200)
    monkeypatch.setattr(host_memory, "ALIGNED", 1)
    sizes = []

    def add(one, other):
        sizes.append(one.size)
        return one + other

    def sum_and_total(x, y):
        x, y = to_host(x), to_host(y)
        total = streamed_sum(jnp.sum, x, jnp.float32(0))
        return streamed(add, x, y), total

    x, y = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    found, total = jax.jit(sum_and_total)(x, y)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(x + y))
    np.testing.assert_allclose(total, jnp.sum(x), rtol=1e-5, atol=1e-5)
    assert 4 * max(sizes) <= max(200, 4 * x[0].size) and (len(sizes) == 2) == (
        len(x) % max(1, sizes[0] // x[0].size) > 0
    )
