"""What a model returns: for each token, and computed a tile at a time by the task; or for the sequence."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.models.tiles import in_tiles
from lss_jax.parallel.scopes import POOLING


class PerToken(NamedTuple):
    """Outputs that are a function of each token's features alone, such as logits."""

    function: Callable[[Any, jax.Array], Any]  # of the modules and features `x_BtE`
    modules: Any
    x_BpE: jax.Array
    tile: int  # tokens at a time; 0: all at once

    def all(self) -> Any:
        """The outputs for all tokens at once."""
        return self.function(self.modules, self.x_BpE)

    def reduced(self, reduce: Callable[[Any, Any, Any], Any], tokens: Any, context: Any) -> Any:
        """`reduce(outputs, tokens, context)`, small arrays `[B, p]`; outputs exist for one tile at a time.

        `tokens` and `context` are those of `in_tiles`.
        """

        def of_tile(modules: Any, x_BtE: jax.Array, tokens: Any, context: Any) -> Any:
            return reduce(self.function(modules, x_BtE), tokens, context)

        return _in_order(in_tiles(of_tile, self.tile, self.modules, self.x_BpE, tokens, context))


class Pooled(NamedTuple):
    """Outputs of whole sequences, such as logits `[B, C]`: the same on all devices that share a sequence."""

    logits_BC: jax.Array


@jax.named_scope(POOLING)
def mean_over_sequence(x_BpE: jax.Array, is_token_p: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The mean `x_BE` of all tokens' features, float32: one small sum over each of the axes that shard the sequence.

    `is_token_p` (or `[B, p]`) says which tokens there are; the others are padding.
    """
    counted_Bp1 = jnp.broadcast_to(is_token_p, x_BpE.shape[:2])[..., None]
    sum_BE = jnp.sum(jnp.where(counted_Bp1, x_BpE.astype(jnp.float32), 0.0), axis=1)
    total_BE1 = jnp.concatenate((sum_BE, jnp.sum(counted_Bp1, axis=1, dtype=jnp.float32)), axis=-1)
    for axis in axes:
        total_BE1 = jax.lax.psum(total_BE1, axis)
    mean_BE = total_BE1[:, :-1] / jnp.maximum(total_BE1[:, -1:], 1.0)
    for axis in axes:
        mean_BE = jax.lax.pcast(mean_BE, axis, to="varying")  # its gradient is the sum of all devices' gradients
    return mean_BE


@jax.custom_vjp
def _in_order(losses: Any) -> Any:
    """The losses, for which their backward pass waits; a compiler that took them last would hold features and head."""
    return losses


def _forward(losses):
    return losses, losses


def _backward(losses, d_losses):
    return (jax.lax.optimization_barrier((losses, d_losses))[1],)


_in_order.defvjp(_forward, _backward)
