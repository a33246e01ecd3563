"""What a model returns for each token, before it is computed: a task takes its losses a tile of tokens at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lss_jax.models.tiles import in_tiles


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


@jax.custom_vjp
def _in_order(losses: Any) -> Any:
    """The losses, for which their backward pass waits; a compiler that took them last would hold features and head."""
    return losses


def _forward(losses):
    return losses, losses


def _backward(losses, d_losses):
    return (jax.lax.optimization_barrier((losses, d_losses))[1],)


_in_order.defvjp(_forward, _backward)
