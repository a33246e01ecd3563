"""The encoder-decoder: a source and a sequence in, next-token logits of the sequence out, local to a device's segments.

The two have lengths and layouts of their own, and both are sharded over `seq`. Each device encodes its segment of the
source; every layer of the decoder makes keys and values of it, which the strategy of attention moves as it moves those
of self-attention.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from lss_jax.attention.collectives import stacked
from lss_jax.config.schema import Config, ModelConfig
from lss_jax.models.blocks import CrossBlock, keys_and_values_of
from lss_jax.models.embeddings import LearnedPositions
from lss_jax.models.layers import Segment, norm
from lss_jax.models.outputs import PerToken
from lss_jax.models.stack import Stack
from lss_jax.models.transformer import Embedding, Transformer
from lss_jax.parallel.layout import SOURCE
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import gather_sequence


class Pair(NamedTuple):
    """Local tokens of a source, and of the sequence that is predicted from it."""

    source_Bs: jax.Array
    tokens_Bl: jax.Array


class EncoderDecoder(Transformer):
    """A pre-norm encoder-decoder (Vaswani et al. 2017, arXiv 1706.03762), whose decoder attends to the source too.

    Both sides share the token embedding. `model.encoder_layers` are the encoder's, `model.layers` the decoder's.
    """

    block = CrossBlock

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        model = config.model
        if model.positions == "learned":
            self.source_positions = LearnedPositions(model, config.data.source_len, rngs, SOURCE)
        self.encoder = Stack(encoder_of(model), rngs)
        self.encoder_norm = norm(model, rngs)

    def __call__(self, pair: Pair, segment: Segment) -> PerToken:
        """Next-token logits, float32, for local tokens of the sequence at the positions `segment.positions_l`."""
        assert segment.source, "the task gives pairs"
        embedding = self.embedding()
        source_BsE = self.encoded(embedding, pair.source_Bs, segment.source.segment)
        x_BpE, _ = self.features(embedding, pair.tokens_Bl, segment, None, source_BsE)
        return self.logits_of(embedding, x_BpE, segment)

    def remember(self, source_Bs: jax.Array, segment: Segment) -> jax.Array:
        """The keys and values `kv_n2BGsK` that each of the decoder's layers makes of this device's segment."""
        source_BsE = self.encoded(self.embedding(), source_Bs, segment)

        def of_layer(block: CrossBlock) -> jax.Array:
            return stacked(*keys_and_values_of(block.cross_attention, source_BsE, segment))

        return self.stack.over_blocks(of_layer)

    def recall(self, tokens_Bl: jax.Array, segment: Segment, past: Any) -> tuple[PerToken, Any]:
        """Logits from a cache, of the sequence and of what `remember` gave, and what each layer adds to the former."""
        embedding = self.embedding()
        x_BpE, own = self.features(embedding, tokens_Bl, segment, past)
        return self.logits_of(embedding, x_BpE, segment), own

    def encoded(self, embedding: Embedding, source_Bs: jax.Array, segment: Segment) -> jax.Array:
        """The encoder's output, all of this device's segment: gathered over `model` once, for all layers to read."""
        table = self.source_positions if hasattr(self, "source_positions") else None
        x_BpE, _ = self.encoder(self.embedded(embedding, source_Bs, table, segment), segment)
        with jax.named_scope(REGIONS):
            return gather_sequence(self.encoder_norm(x_BpE), segment.model_axis)


def encoder_of(model: ModelConfig) -> ModelConfig:
    """The sizes of the encoder, whose layers are `encoder_layers`."""
    return dataclasses.replace(model, layers=model.encoder_layers)
