"""The next byte: as often as its probability says."""

import jax.numpy as jnp
import numpy as np
import pytest

from lss_jax.generation.sampling import Sampling, sample, spoken

GREEDY = Sampling(0.0, None, 1.0, seed=0)


COUNT = 4_000
LOGITS = np.random.default_rng(0).normal(0, 2, 256).astype(np.float32)


def drawn(sampling: Sampling, count: int = COUNT) -> np.ndarray:
    """How often each byte comes."""
    logits_BV = jnp.broadcast_to(LOGITS, (count, 256))
    bytes_B = sample(logits_BV, sampling, jnp.zeros(count, jnp.uint32), jnp.arange(count))
    return np.bincount(np.asarray(bytes_B), minlength=256) / count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.5, None, 1.0), (1.5, 5, 1.0), (1.0, None, 0.4), (2, 9, 0.7)],
)
def test_bytes_come_as_often_as_they_should(temperature, top_k, top_p):
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-p)
    p[order[top_k or 256 :]] = 0
    p /= p.sum()
    enough = np.searchsorted(np.cumsum(p[order]), top_p) + 1
    p[order[enough:]] = 0
    p /= p.sum()
    found = drawn(Sampling(temperature, top_k, top_p, seed=1))
    assert not found[p == 0].any()
    assert np.abs(found - p).sum() < 6 * np.sqrt(p * (1 - p) / COUNT).sum()


def test_greedy_top_k_1_and_a_tiny_top_p_take_the_likeliest_byte():
    for sampling in (GREEDY, Sampling(1.0, 1, 1.0, 0), Sampling(1.0, None, 1e-6, 0), Sampling(1e-30, None, 1.0, 0)):
        assert drawn(sampling, 10)[LOGITS.argmax()] == 1


def test_only_bytes_are_drawn_from_a_larger_vocabulary():
    logits_BV = jnp.concatenate((jnp.zeros((50, 256)), jnp.full((50, 44), 9.0)), axis=1)
    for sampling in (GREEDY, Sampling(1.0, None, 1.0, 0)):
        for vocab, end, allowed in ((256, None, range(256)), (256, 9, range(256)), (250, 280, [*range(250), 280])):
            allowed_BV = spoken(logits_BV, vocab, end)
            found = sample(allowed_BV, sampling, jnp.zeros(50, jnp.uint32), jnp.arange(50))
            assert set(np.asarray(found).tolist()) <= set(allowed)
