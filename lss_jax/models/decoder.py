"""The decoder-only language model: tokens in, next-token logits out, all of it local to a device's segment."""

from typing import Any

import jax
from flax import nnx

from lss_jax.config.schema import Config
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


class Decoder(nnx.Module):
    """A pre-norm GPT (Radford et al. 2019) whose attention is an argument, `Segment.attend`."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.model = model
        self.tokens = TokenEmbedding(model, rngs)
        if model.positions == "learned":
            table: Any = RestartedPositions if config.data.restart_positions else LearnedPositions
            self.positions = table(model, config.data.seq_len, rngs)
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
        x_BpE = self._with_positions(x_BpE, segment)
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

    def _with_positions(self, x_BpE: jax.Array, segment: Segment) -> jax.Array:
        """The embedded tokens of this device's part, with their positions added if that is how the model has them."""
        if hasattr(self, "positions") and isinstance(self.positions, LearnedPositions):
            return self.positions(x_BpE)
        if self.model.positions not in ("learned", "sinusoidal"):
            return x_BpE
        embedded_p = own_part(segment.embedded_l, segment.model_axis, segment.embedded_l.ndim - 1)
        if self.model.positions == "sinusoidal":
            return sinusoidal(x_BpE, embedded_p)
        return whole(self.positions, self.model.dtype)(x_BpE, embedded_p)
