"""The decoder-only language model: tokens in, next-token logits out, all of it local to a device's segment."""

from typing import Any

import jax

from lss_jax.models.layers import Segment
from lss_jax.models.outputs import PerToken
from lss_jax.models.transformer import Transformer


class Decoder(Transformer):
    """A pre-norm GPT (Radford et al. 2019)."""

    def __call__(self, tokens_Bl: jax.Array, segment: Segment) -> PerToken:
        """Next-token logits for local `tokens_Bl` at the natural positions `segment.positions_l`."""
        return self.recall(tokens_Bl, segment, None)[0]

    def recall(self, tokens_Bl: jax.Array, segment: Segment, past: Any) -> tuple[PerToken, Any]:
        """Logits as in `__call__` with attention to the cached `past` too, and what each layer adds to the cache."""
        embedding = self.embedding()
        x_BpE, own = self.features(embedding, tokens_Bl, segment, past)
        return self.logits_of(embedding, x_BpE, segment), own
