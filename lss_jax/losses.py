"""The loss law: sums of token losses here, one division by the global number of counted tokens at the end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.data.loader import IGNORED


class LossSum(NamedTuple):
    """Sums over some tokens, float32 scalars: divide only after both are summed over the mesh."""

    nats: Any
    tokens: Any  # those that count

    def mean(self) -> jax.Array:
        """Nats per counted token."""
        return self.nats / jnp.maximum(self.tokens, 1.0)


def cross_entropy(logits_BlV: jax.Array, targets_Bl: jax.Array) -> LossSum:
    """Cross-entropy in nats, summed over this device's tokens whose target is not `IGNORED`."""
    counted_Bl = targets_Bl != IGNORED
    target_logit_Bl = jnp.take_along_axis(logits_BlV, jnp.maximum(targets_Bl, 0)[..., None], axis=-1)[..., 0]
    nats_Bl = jax.nn.logsumexp(logits_BlV, axis=-1) - target_logit_Bl
    return LossSum(jnp.sum(nats_Bl, where=counted_Bl), jnp.sum(counted_Bl, dtype=jnp.float32))
