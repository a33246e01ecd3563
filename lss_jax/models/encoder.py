"""The encoder-only model: every token may attend to every other; logits for each token, or for the whole sequence."""

import jax

from lss_jax.models.layers import Segment, whole
from lss_jax.models.outputs import PerToken, Pooled, mean_over_sequence
from lss_jax.models.transformer import Transformer


class Encoder(Transformer):
    """A pre-norm BERT (Devlin et al. 2018, arXiv 1810.04805), in the embeddings and blocks of the decoder."""

    def __call__(self, tokens_Bl: jax.Array, segment: Segment) -> PerToken | Pooled:
        """Logits of each token; with `model.pooling="mean"` those of the mean of all tokens' features."""
        embedding = self.embedding()
        x_BpE, _ = self.features(embedding, tokens_Bl, segment, None)
        if self.model.pooling == "none":
            return self.logits_of(embedding, x_BpE, segment)
        mean_B1E = mean_over_sequence(self.final_norm(x_BpE), segment.is_token_p, segment.sequence_axes)[:, None]
        return Pooled(whole(self.head, self.model.dtype).logits(mean_B1E.astype(self.model.dtype))[:, 0])
