"""Language modelling over bytes or tokens: each next one is predicted from those that the mask shows."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lss_jax.attention.mask import Intervals, MaskKind, bidirectional, documents, prefix_causal, window
from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.batch import IGNORED, Batch
from lss_jax.data.corpus import Corpus
from lss_jax.data.loader import Read, next_tokens
from lss_jax.models.losses import EncodedLossSum, LossSum
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks.task import Means, Metric
from lss_jax.tasks.token_task import TokenTask, entropy_metrics


def _bits(means: Means) -> Any:
    """Bits per byte of text; nan where no target stands for any."""
    return means["loss"] / math.log(2) / means["bytes"] if means["bytes"] else math.nan


OF_TOKENS = (entropy_metrics("token")[0], Metric("bits_per_byte", "bits/byte", "bits per byte", _bits))


class LanguageModel(TokenTask):
    """Next-token prediction. The model's outputs are logits, `BpV`, or `BlV` for this device's vocabulary shard.

    The loss of encoded text is per token, and bits per byte count the bytes of text that the targets stand for.
    """

    needs = "next_token"
    by_position = True
    ahead = 1
    sums: Any = LossSum

    def __init__(self, config: Config):
        super().__init__(config)
        self.counts_bytes = self.encoded
        self.metrics = OF_TOKENS if self.encoded else entropy_metrics(self.items.removesuffix("s"))
        self.headline = self.metrics[1]
        if self.encoded:
            self.sums = EncodedLossSum

    def counted(self) -> dict[str, Any]:
        prompts = self.config.data.prompt_field
        keys = {"attention.prefix": self.config.attention.prefix} | super().counted()
        return keys | ({"data.prompt_field": prompts} if prompts else {})

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from no_classes(self.config)

    def reading(self, turn: int) -> Read:
        return self.learned(next_tokens)

    def check(self, corpus: Corpus) -> None:
        """Raises a ConfigError if there are more tokens than the model has, or nothing to predict behind the prefix."""
        super().check(corpus)
        prefix = self.config.attention.prefix
        shortest = min(len(stream.tokens) for streams in corpus.streams.values() for stream in streams)
        if shortest <= prefix:
            raise ConfigError(
                f"attention.prefix={prefix} leaves nothing to predict in a split of {shortest} {self.items}; use a "
                f"shorter prefix or a longer file"
            )

    @property
    def mask_kind(self) -> MaskKind:
        prefix = self.config.attention.prefix
        return MaskKind(causal=True, window=self.window, prefix=prefix, documents=self.packed, padded=False)

    def mask(self, positions_l: jax.Array, batch: Batch | None = None) -> Intervals:
        """A causal mask with the config's prefix and window; in packed windows, within a token's own document."""
        prefix, seq_len = self.config.attention.prefix, self.config.data.seq_len
        mask = prefix_causal(positions_l, prefix) & bidirectional(positions_l, seq_len)
        if self.window:
            mask &= window(positions_l, self.window)
        if batch is not None and batch.documents is not None:
            mask &= documents(batch.documents)
        return mask

    def losses(self, outputs: jax.Array, batch: Batch, axis: str | None) -> LossSum | EncodedLossSum:
        in_prefix_l = batch.positions < self.config.attention.prefix - 1  # the mask shows them their targets
        loss = self.cross_entropy(outputs, jnp.where(in_prefix_l, IGNORED, batch.targets), axis)
        if batch.target_bytes is None:
            return LossSum(loss.nats, loss.tokens)
        bytes_Bp = own_part(batch.target_bytes, axis, 1) * loss.tokens  # of those that count
        return EncodedLossSum(loss.nats, bytes_Bp, loss.tokens)


def no_classes(config: Config) -> Iterator[str]:
    """Errors of a config whose model predicts classes, for tasks that predict tokens."""
    labels = config.labels
    if labels.names or labels.weights:
        yield (
            f"labels.names={labels.names!r}, labels.weights={labels.weights} have no use with task={config.task!r}, "
            f'which predicts tokens; use labels.names="", labels.weights=()'
        )
    if config.model.classes or config.model.pooling != "none":
        yield (
            f"model.classes={config.model.classes}, model.pooling={config.model.pooling!r} are for tasks with labels, "
            f'and task={config.task!r} predicts tokens; use model.classes=0, model.pooling="none"'
        )
