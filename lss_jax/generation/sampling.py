"""Samples the next token from its logits: greedily, or at a temperature from the likeliest.

A sample depends on the seed, the prompt (and which of several equal ones it is), the position and the logits alone:
neither the mesh nor the other prompts of a batch change a text.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options by which a token is sampled."""

    temperature: float  # divides the logits; 0: the likeliest token, always
    top_k: int | None  # only the k likeliest; None: all
    top_p: float  # of those, the fewest with this total probability
    seed: int

    def problems(self) -> Iterator[str]:
        """Options that cannot work, a line each."""
        if not 0 <= self.temperature < float("inf"):
            yield f"--temperature={self.temperature} must be at least 0 and finite; 0 takes the likeliest token"
        if self.top_k is not None and self.top_k < 1:
            yield f"--top-k={self.top_k} leaves no token; use at least 1, or leave it out for all"
        if not 0 < self.top_p <= 1:
            yield f"--top-p={self.top_p} must be greater than 0 and at most 1, which is all"
        if not 0 <= self.seed < 2**32:
            yield f"--seed={self.seed} must be at least 0 and less than 2**32"


def spoken(logits_BV: jax.Array, vocab: int, end: int | None) -> jax.Array:
    """The logits of the first `vocab` tokens, which stand for text, and of the one that ends it; all others are out."""
    if end is None or end < vocab:
        return logits_BV[:, :vocab]
    number_V = jnp.arange(end + 1)
    return jnp.where((number_V < vocab) | (number_V == end), logits_BV[:, : end + 1], -jnp.inf)


def sample(logits_BV: jax.Array, sampling: Sampling, stream_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Samples a token per row, int32 `[B]`; rows of different streams (uint32) are independent."""
    vocab = logits_BV.shape[1]
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / sampling.temperature
    if (sampling.top_k or vocab) < vocab or sampling.top_p < 1:
        logits_BV = _masked(logits_BV, sampling.top_k or vocab, sampling.top_p)
    return jax.vmap(_sampled, (0, None, 0, 0))(logits_BV, sampling.seed, stream_B, position_B)


def _masked(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Masks all logits but the `top_k` likeliest, and of these all but the fewest with total probability `top_p`.

    The latter is nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751, Sec. 3.1). Masked logits are minus infinity.
    Of equally likely tokens the lower ones come first.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, -1)
    sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV)
    before_BV = jnp.cumsum(probability_BV, -1) - probability_BV  # zero for the likeliest, which is thus never masked
    masked_BV = jnp.where(before_BV < top_p, sorted_BV, -jnp.inf)
    return jnp.take_along_axis(masked_BV, jnp.argsort(order_BV, axis=-1), -1)


def _sampled(logits_V: jax.Array, seed: int, stream: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), position)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)
