"""The decoder-only language model: tokens in, next-token logits out, all of it local to a device's segment."""

from typing import Any

import jax
from flax import nnx

from lss_jax.config.schema import Config
from lss_jax.models.embeddings import Head, LearnedPositions, TokenEmbedding, sinusoidal, without_padding
from lss_jax.models.layers import Segment, drop, norm, whole
from lss_jax.models.outputs import PerToken
from lss_jax.models.stack import Stack
from lss_jax.parallel.dropout import EMBEDDING
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import gather_sequence


class Decoder(nnx.Module):
    """A pre-norm GPT (Radford et al. 2019) whose attention is an argument, `Segment.attend`."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.model = model
        self.tokens = TokenEmbedding(model, rngs)
        if model.positions == "learned":
            self.positions = LearnedPositions(model, config.data.seq_len, rngs)
        self.stack = Stack(model, rngs)
        self.final_norm = norm(model, rngs)
        if not model.tied_head:
            self.head = Head(model, rngs)

    def __call__(self, tokens_Bl: jax.Array, segment: Segment) -> PerToken:
        """Next-token logits, float32, for local `tokens_Bl` at the natural positions `segment.positions_l`.

        Their shape is `BpV`, this device's part of the segment; with `model.vocab_parallel` it is `BlV`, the whole
        segment and this device's shard of the vocabulary.
        """
        return self.recall(tokens_Bl, segment, None)[0]

    def recall(self, tokens_Bl: jax.Array, segment: Segment, past: Any) -> tuple[PerToken, Any]:
        """Logits as in `__call__` with attention to the cached `past` too, and what each layer adds to the cache."""
        axis, dtype = segment.model_axis, self.model.dtype
        embedding = whole(self.tokens, dtype)
        x_BpE = embedding(tokens_Bl, axis)
        if hasattr(self, "positions"):
            x_BpE = self.positions(x_BpE)
        if self.model.positions == "sinusoidal":
            x_BpE = sinusoidal(x_BpE, segment.positions_p)
        x_BpE, own = self.stack(drop(x_BpE, segment.dropout, EMBEDDING), segment, past)

        def logits(modules: Any, x_BtE: jax.Array) -> jax.Array:
            final_norm, head = modules
            x_BtE = final_norm(x_BtE)
            if axis is None or not self.model.vocab_parallel:
                return head.logits(x_BtE)
            with jax.named_scope(REGIONS):
                x_BlE = gather_sequence(x_BtE, axis)  # a vocabulary shard needs every token
            return without_padding(head.logits(x_BlE), self.model.vocab, axis)

        head = whole(self.head, dtype) if hasattr(self, "head") else embedding
        return PerToken(logits, (self.final_norm, head), x_BpE, self.model.tile), own
