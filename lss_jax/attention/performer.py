"""Performer (Choromanski et al. 2020, arXiv 2009.14794): softmax attention approximated by positive random features.

The exponential of a product is the expectation of a product of features, `exp(w x - |x|^2 / 2)` for normally
distributed `w` (Sec. 2.3), of which `attention.features` are drawn, orthogonal in blocks (Sec. 2.4). The rest is
linear attention: what it sends does not depend on the length of the sequence, but grows with the features.

Features are drawn once, from the seed: the same for all layers, heads and meshes, where the paper may draw them anew in
each step. Its stabilizer, the largest exponent, is taken per query and per key, and states carry the largest of theirs
along. What is added to each feature, so that no sum of weights vanishes, is a share of the token's own largest one. So
the result is the same however the sequence is sharded.
"""

from collections.abc import Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from lss_jax.attention.linear import LINEAR, attend_by_states, state_operations, state_traffic
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import Local, Operations, Shards, Shown
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.config.schema import AttentionConfig

SMALLEST = 1e-6


@cache
def random_features(seed: int, features: int, width: int) -> np.ndarray:
    """Normally distributed rows `[D, K]`, float32, orthogonal to one another in blocks of `K` (Sec. 2.4)."""
    random = np.random.default_rng(seed)
    blocks = []
    for _ in range(-(-features // width)):
        directions_KK, triangle_KK = np.linalg.qr(random.standard_normal((width, width)))
        uniform_KK = directions_KK * np.sign(np.diag(triangle_KK))  # QR alone favours some directions
        lengths_K1 = np.linalg.norm(random.standard_normal((width, width)), axis=1, keepdims=True)
        blocks.append(uniform_KK.T * lengths_K1)
    return np.concatenate(blocks)[:features].astype(np.float32)


def softmax_features(x: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Positive features of the softmax kernel (Lemma 1), divided by the largest, and the logarithm of that.

    No feature is less than `SMALLEST`, which the authors' code adds too.
    """
    K, (features, seed) = x.shape[-1], _drawn(setting)
    x = x.astype(jnp.float32) * K**-0.25  # a score is a product of two of these
    exponent = jnp.einsum("...K,DK->...D", x, random_features(seed, features, K)) - (x * x).sum(-1, keepdims=True) / 2
    largest = jax.lax.stop_gradient(exponent.max(-1))
    return jnp.exp(exponent - largest[..., None]) + SMALLEST, largest


def performer_attention(local: Local, setting: Setting) -> jax.Array:
    """This segment's attention `o_BlHK`, inside `shard_map` over `setting.axis`."""
    return attend_by_states(local, setting, partial(softmax_features, setting=setting))


def _drawn(setting: Setting) -> tuple[int, int]:
    """The number of features, and their seed."""
    assert setting.approximation
    return setting.approximation.features, setting.approximation.seed


def _traffic(sizes: Sizes, setting: Setting) -> dict[str, list[Traffic]]:
    return state_traffic(sizes, setting, _drawn(setting)[0])


def _operations(_shown: Shown, sizes: Sizes, setting: Setting) -> Operations:
    return state_operations(sizes, setting, _drawn(setting)[0], projected=sizes.K)


def _problems(attention: AttentionConfig, shards: Shards) -> Iterator[str]:
    """It needs features."""
    if attention.features == 0:
        yield (
            'attention.features=0 leaves attention.strategy="performer" nothing to compute with; use a few times the '
            'width of a head, such as attention.features=128, or attention.strategy="linear"'
        )
    yield from LINEAR.problems(attention, shards)


PERFORMER = LINEAR._replace(
    defined_by=("attention.features", "seed"),
    attention=performer_attention,
    traffic=_traffic,
    options=("features",),
    problems=_problems,
    operations=_operations,
)
