"""The encoder-decoder: a source and a sequence in, next-token logits of the sequence out, local to a device's segments.

The two have lengths and layouts of their own, and both are sharded over `seq`. Each device encodes its segment of the
source; every layer of the decoder makes keys and values of it, which the strategy of attention moves as it moves those
of self-attention.
"""

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from lss_jax.config.schema import Config, ModelConfig
from lss_jax.models.blocks import CrossBlock
from lss_jax.models.embeddings import Head, LearnedPositions, TokenEmbedding, sinusoidal, without_padding
from lss_jax.models.layers import Segment, drop, norm, whole
from lss_jax.models.outputs import PerToken
from lss_jax.models.stack import Stack
from lss_jax.parallel.dropout import EMBEDDING
from lss_jax.parallel.layout import SOURCE
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import gather_sequence, own_part


class Pair(NamedTuple):
    """Local tokens of a source, and of the sequence that is predicted from it."""

    source_Bs: jax.Array
    tokens_Bl: jax.Array


class EncoderDecoder(nnx.Module):
    """A pre-norm encoder-decoder (Vaswani et al. 2017) whose attentions are arguments, in `Segment`.

    Both sides share the token embedding. `model.layers` are the decoder's, `model.encoder_layers` the encoder's.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.model = model
        self.tokens = TokenEmbedding(model, rngs)
        if model.positions == "learned":
            self.source_positions = LearnedPositions(model, config.data.source_len, rngs, SOURCE)
            self.positions = LearnedPositions(model, config.data.seq_len, rngs)
        self.encoder = Stack(encoder_of(model), rngs)
        self.encoder_norm = norm(model, rngs)
        self.stack = Stack(model, rngs, CrossBlock)
        self.final_norm = norm(model, rngs)
        if not model.tied_head:
            self.head = Head(model, rngs)

    def __call__(self, pair: Pair, segment: Segment) -> PerToken:
        """Next-token logits, float32, for local tokens of the sequence at the positions `segment.positions_l`.

        Their shape is `BpV`, this device's part of the segment; with `model.vocab_parallel` it is `BlV`, the whole
        segment and this device's shard of the vocabulary.
        """
        embedding = whole(self.tokens, self.model.dtype)
        source_BsE = self._encoded(embedding, pair.source_Bs, segment.source.segment)
        x_BpE = self._embedded(embedding, pair.tokens_Bl, "positions", segment)
        x_BpE, _ = self.stack(x_BpE, segment, shared=source_BsE)
        return self._outputs(embedding, x_BpE, segment.model_axis)

    def _encoded(self, embedding: TokenEmbedding, source_Bs: jax.Array, segment: Segment) -> jax.Array:
        """The encoder's output, all of this device's segment: gathered over `model` once, for all layers to read."""
        x_BpE = self._embedded(embedding, source_Bs, "source_positions", segment)
        x_BpE, _ = self.encoder(x_BpE, segment)
        with jax.named_scope(REGIONS):
            return gather_sequence(self.encoder_norm(x_BpE), segment.model_axis)

    def _embedded(self, embedding: TokenEmbedding, tokens_Bl: jax.Array, table: str, segment: Segment) -> jax.Array:
        """The tokens of this device's part, with positions if that is how the model has them."""
        x_BpE = embedding(tokens_Bl, segment.model_axis)
        if self.model.positions == "learned":
            x_BpE = getattr(self, table)(x_BpE)
        if self.model.positions == "sinusoidal":
            x_BpE = sinusoidal(x_BpE, own_part(segment.embedded_l, segment.model_axis, segment.embedded_l.ndim - 1))
        return drop(x_BpE, segment.dropout, EMBEDDING)

    def _outputs(self, embedding: TokenEmbedding, x_BpE: jax.Array, axis: str | None) -> PerToken:
        def logits(modules: tuple, x_BtE: jax.Array) -> jax.Array:
            final_norm, head = modules
            x_BtE = final_norm(x_BtE)
            if axis is None or not self.model.vocab_parallel:
                return head.logits(x_BtE)
            with jax.named_scope(REGIONS):
                x_BlE = gather_sequence(x_BtE, axis)  # a vocabulary shard needs every token
            return without_padding(head.logits(x_BlE), self.model.vocab, axis)

        head = whole(self.head, self.model.dtype) if hasattr(self, "head") else embedding
        return PerToken(logits, (self.final_norm, head), x_BpE, self.model.tile)


def encoder_of(model: ModelConfig) -> ModelConfig:
    """The sizes of the encoder: its layers are `encoder_layers`."""
    return dataclasses.replace(model, layers=model.encoder_layers)
