"""The decoder-only language model: tokens in, next-token logits out, everything on this device's segment."""

import jax
from flax import nnx

from lss_jax.config import Config
from lss_jax.dropout import EMBEDDING
from lss_jax.embeddings import Head, LearnedPositions, TokenEmbedding, logits, sinusoidal
from lss_jax.layers import Segment, Stack, drop, layer_norm


class Decoder(nnx.Module):
    """A pre-norm GPT (Radford et al. 2019) whose attention is handed in."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.sinusoidal = model.positions == "sinusoidal"
        self.tokens = TokenEmbedding(model, rngs)
        if model.positions == "learned":
            self.positions = LearnedPositions(model, config.data.seq_len, rngs)
        self.stack = Stack(model, rngs)
        self.final_norm = layer_norm(model, rngs)
        if not model.tied_head:
            self.head = Head(model, rngs)

    def __call__(self, tokens_Bl: jax.Array, segment: Segment) -> jax.Array:
        """Logits `BlV` (float32) of the token after each of `tokens_Bl`, which stand at `segment.positions_l`."""
        x_BlE = self.tokens(tokens_Bl)
        if hasattr(self, "positions"):
            x_BlE = self.positions(x_BlE)
        if self.sinusoidal:
            x_BlE = sinusoidal(x_BlE, segment.positions_l)
        x_BlE = self.stack(drop(x_BlE, segment.dropout, EMBEDDING), segment)
        x_BlE = self.final_norm(x_BlE)
        return self.head(x_BlE) if hasattr(self, "head") else logits(x_BlE, self.tokens.kernel_EV())
