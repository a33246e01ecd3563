"""The loss law: losses per token here, then sums over the mesh, then one division by the global count."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.data.batch import IGNORED
from lss_jax.parallel.scopes import LOSS
from lss_jax.parallel.tensor_parallel import own_numbers, own_part


class LossSum(NamedTuple):
    """Loss and counted tokens, float32, per token or summed; divide only after both are summed over the mesh."""

    nats: Any
    tokens: Any  # those that count; per token 1 or 0

    def mean(self) -> jax.Array:
        """Nats per counted token."""
        return self.nats / jnp.maximum(self.tokens, 1.0)


class EncodedLossSum(NamedTuple):
    """The same for tokens that stand for several bytes each, or for none."""

    nats: Any
    bytes: Any  # of text, of the tokens that count
    tokens: Any


class ExactLossSum(NamedTuple):
    """The same with the tokens whose target has the largest logit, or one as large."""

    nats: Any
    exact: Any
    tokens: Any


def cross_entropy(logits_BlV: jax.Array, targets_Bl: jax.Array) -> ExactLossSum:
    """Cross-entropy of each local token, in nats, `[B, l]`; zero where the target is `IGNORED`."""
    target_logit_Bl = jnp.take_along_axis(logits_BlV, jnp.maximum(targets_Bl, 0)[..., None], axis=-1)[..., 0]
    nats_Bl = jax.nn.logsumexp(logits_BlV, axis=-1) - target_logit_Bl
    return _counted(nats_Bl, target_logit_Bl >= jnp.max(logits_BlV, axis=-1), targets_Bl)


def _counted(nats: jax.Array, exact: jax.Array, targets: jax.Array) -> ExactLossSum:
    """The terms of each token, zero where the target is `IGNORED`."""
    counted = targets != IGNORED
    return ExactLossSum(
        jnp.where(counted, nats, 0.0), (counted & exact).astype(jnp.float32), counted.astype(jnp.float32)
    )


@jax.named_scope(LOSS)
def vocab_parallel_cross_entropy(logits_BlV: jax.Array, targets_Bl: jax.Array, axis: str) -> ExactLossSum:
    """Cross-entropy with the vocabulary sharded over `axis`, in nats: `[B, p]`, for this device's part of the tokens.

    `logits_BlV` are those of the whole segment for this device's vocabulary shard. No device ever holds all logits of a
    token: the maximum, the sum of exponentials and the target's logit are reduced over `axis`.
    """
    largest_Bl = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits_BlV, axis=-1)), axis)
    logits_BlV = logits_BlV - largest_Bl[..., None]
    number_Bl, here_Bl = own_numbers(targets_Bl, logits_BlV.shape[2], axis)
    target_logit_Bl = jnp.take_along_axis(logits_BlV, number_Bl[..., None], axis=-1)[..., 0]
    terms_2Bl = jnp.stack((jnp.sum(jnp.exp(logits_BlV), axis=-1), jnp.where(here_Bl, target_logit_Bl, 0.0)))
    sum_Bp, target_logit_Bp = jax.lax.psum_scatter(terms_2Bl, axis, scatter_dimension=2, tiled=True)
    nats_Bp = jnp.log(sum_Bp) - target_logit_Bp  # of logits of which the largest is zero
    return _counted(nats_Bp, target_logit_Bp >= 0.0, own_part(targets_Bl, axis, 1))
