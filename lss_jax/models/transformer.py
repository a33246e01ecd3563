"""What all transformers here have in common: embedded tokens, a stack of blocks, a head over each token's features."""

from typing import Any

import jax
from flax import nnx

from lss_jax.config.schema import Config
from lss_jax.models.blocks import Block
from lss_jax.models.embeddings import (
    Head,
    LearnedPositions,
    RestartedPositions,
    TokenEmbedding,
    sinusoidal,
    without_padding,
)
from lss_jax.models.layers import Segment, drop, norm, whole
from lss_jax.models.outputs import PerToken
from lss_jax.models.stack import Stack
from lss_jax.parallel.dropout import EMBEDDING
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import gather_sequence, own_part


class Transformer(nnx.Module):
    """A pre-norm transformer whose attention is an argument, `Segment.attend`: the mask makes it causal or not.

    Its head gives logits of the vocabulary, or of `model.classes`.
    """

    block: type[Block] = Block

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.model = model
        self.tokens = TokenEmbedding(model, rngs)
        if model.positions == "learned":
            table: Any = RestartedPositions if config.data.restart_positions else LearnedPositions
            self.positions = table(model, config.data.seq_len, rngs)
        self.stack = Stack(model, rngs, self.block)
        self.final_norm = norm(model, rngs)
        if model.classes or not model.tied_head:
            self.head = Head(model, rngs)

    def embedding(self) -> TokenEmbedding:
        """The token embedding, gathered if it is sharded at rest: once, for all of its uses."""
        return whole(self.tokens, self.model.dtype)

    def features(
        self, embedding: TokenEmbedding, tokens_Bl: jax.Array, segment: Segment, past: Any, shared: Any = None
    ) -> tuple[jax.Array, Any]:
        """This device's part `x_BpE` of the residual stream after all layers, and what they add to the cache.

        `past` and `shared` are those of `Stack`.
        """
        table = self.positions if hasattr(self, "positions") else None
        return self.stack(self.embedded(embedding, tokens_Bl, table, segment), segment, past, shared)

    def embedded(
        self, embedding: TokenEmbedding, tokens_Bl: jax.Array, table: nnx.Module | None, segment: Segment
    ) -> jax.Array:
        """The tokens of this device's part, `x_BpE`, with the positions of a table, or as the model has them."""
        x_BpE = self._with_positions(embedding(tokens_Bl, segment.model_axis), table, segment)
        return drop(x_BpE, segment.dropout, EMBEDDING)

    def logits_of(self, embedding: TokenEmbedding, x_BpE: jax.Array, segment: Segment) -> PerToken:
        """Logits of each token, float32: `BpV` for this device's part of the segment.

        With `model.vocab_parallel` they are `BlV`, the whole segment and this device's shard of the vocabulary. Classes
        are not sharded: `BpC`.
        """
        model, axis = self.model, segment.model_axis
        if model.classes or not model.vocab_parallel:
            axis = None

        def logits(modules: Any, x_BtE: jax.Array) -> jax.Array:
            final_norm, head = modules
            x_BtE = final_norm(x_BtE)
            if axis is None:
                return head.logits(x_BtE)
            with jax.named_scope(REGIONS):
                x_BlE = gather_sequence(x_BtE, axis)  # a vocabulary shard needs every token
            return without_padding(head.logits(x_BlE), model.vocab, axis)

        head = whole(self.head, model.dtype) if hasattr(self, "head") else embedding
        return PerToken(logits, (self.final_norm, head), x_BpE, model.tile)

    def _with_positions(self, x_BpE: jax.Array, table: Any, segment: Segment) -> jax.Array:
        """The embedded tokens of this device's part, with their positions added if that is how the model has them."""
        if isinstance(table, LearnedPositions):
            return table(x_BpE)
        if self.model.positions not in ("learned", "sinusoidal"):
            return x_BpE
        embedded_p = own_part(segment.embedded_l, segment.model_axis, segment.embedded_l.ndim - 1)
        if self.model.positions == "sinusoidal":
            return sinusoidal(x_BpE, embedded_p)
        return whole(table, self.model.dtype)(x_BpE, embedded_p)
