"""The decoder-only language model: tokens in, next-token logits out, everything on this device's segment."""

from functools import partial

import jax
from flax import nnx

from lss_jax.config import Config
from lss_jax.embeddings import Head, LearnedPositions, TokenEmbedding, logits, rope
from lss_jax.layers import Attend, Stack, layer_norm


class Decoder(nnx.Module):
    """A pre-norm GPT (Radford et al. 2019) whose attention is handed in."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.rope = model.positions == "rope"
        self.tokens = TokenEmbedding(model, rngs)
        if model.positions == "learned":
            self.positions = LearnedPositions(model, config.data.seq_len, rngs)
        self.stack = Stack(model, rngs)
        self.final_norm = layer_norm(model, rngs)
        if not model.tied_head:
            self.head = Head(model, rngs)

    def __call__(self, tokens_Bl: jax.Array, positions_l: jax.Array, attend: Attend) -> jax.Array:
        """Logits `BlV` (float32) of the token after each of `tokens_Bl`, which stand at `positions_l`."""
        x_BlE = self.tokens(tokens_Bl)
        if hasattr(self, "positions"):
            x_BlE = self.positions(x_BlE)
        rotate = partial(rope, positions_l=positions_l) if self.rope else lambda x_BlHK: x_BlHK
        x_BlE = self.final_norm(self.stack(x_BlE, rotate, attend))
        return self.head(x_BlE) if hasattr(self, "head") else logits(x_BlE, self.tokens.kernel_EV())
