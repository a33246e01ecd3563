"""Language modelling over bytes or tokens: each next one is predicted from those that the mask shows."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.mask import Intervals, bidirectional, documents, prefix_causal, window
from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.batch import IGNORED, Batch, batch_like, batch_specs
from lss_jax.data.corpus import Corpus, is_packed, open_corpus
from lss_jax.data.loader import Window, read_batch
from lss_jax.data.split import WindowSplit
from lss_jax.data.text import BYTES, ByteText, Tokenizer
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.models.losses import EncodedLossSum, LossSum, cross_entropy, vocab_parallel_cross_entropy
from lss_jax.models.tiles import tiles_on
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import LOSS
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks.task import Means, Metric, Task


def _bits(means: Means) -> Any:
    """Bits per byte of text; nan where no target stands for any."""
    return means["loss"] / math.log(2) / means["bytes"] if means["bytes"] else math.nan


OF_BYTES = (
    Metric("loss", "nats/byte", "nats per byte", lambda means: means["loss"]),
    Metric("bits_per_byte", "bits/byte", "bits per byte", lambda means: means["loss"] / math.log(2)),
)
OF_TOKENS = (
    Metric("loss", "nats/token", "nats per token", lambda means: means["loss"]),
    Metric("bits_per_byte", "bits/byte", "bits per byte", _bits),
)


class LanguageModel(Task):
    """Next-token prediction. The model's outputs are logits, `BpV`, or `BlV` for this device's vocabulary shard.

    Tokens are bytes, or what a tokenizer makes of the text. Then the loss is per token, and bits per byte count the
    bytes of text that the targets stand for.
    """

    sums: Any = LossSum
    items = "bytes"
    metrics = OF_BYTES
    headline = OF_BYTES[1]

    def __init__(self, config: Config):
        super().__init__(config)
        self.encoded = config.data.tokenizer != BYTES
        if self.encoded:
            self.sums, self.items, self.metrics, self.headline = EncodedLossSum, "tokens", OF_TOKENS, OF_TOKENS[1]

    @property
    def text(self) -> Tokenizer:
        """What the tokens stand for.

        Raises:
          ConfigError: the file of the tokenizer cannot be used.
        """
        return load_tokenizer(self.config.data.tokenizer)

    @property
    def packed(self) -> bool:
        """Whether windows hold several documents, which do not attend to one another."""
        return is_packed(self.config.data)

    def introduction(self, split: WindowSplit) -> Iterator[str]:
        if self.packed:
            separator = self.config.data.separator
            ends = f", each ending with {separator!r}" if separator else ""
            yield f"packed   {split.documents:,} documents in the training data{ends}"
        shares = split.shares
        if shares[1:]:
            for part, stream, share in zip(self.config.data.parts, split.streams, shares, strict=True):
                yield f"source   {share:.1%} of the windows from {part}, {len(stream.tokens):,} {self.items}"

    def counted(self) -> dict[str, Any]:
        keys = {"attention.prefix": self.config.attention.prefix, "data.separator": self.config.data.separator}
        prompts = self.config.data.prompt_field
        return keys | ({"data.prompt_field": prompts} if prompts else {})

    def problems(self) -> Iterator[str]:
        vocab, data = self.config.model.vocab, self.config.data
        if not self.encoded and vocab < ByteText.vocab:
            needed = ByteText.vocab
            yield f"model.vocab={vocab} is less than {needed}, which byte-level data needs; use model.vocab={needed}"
        if data.restart_positions and not self.packed:
            yield (
                f"data.restart_positions=True has no use with data.source={data.source!r}, data.path={data.path!r}, "
                f"which is one document; give a data.separator or several documents, or use False"
            )

    def traffic(self, mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, Traffic]]:
        """Over a sharded vocabulary two sums and a maximum per token, and the gradient of the two."""
        if self.config.model.vocab_parallel:
            sizes, times = sizes_of(self.config, mesh), self.config.optim.accumulate
            tiles, parts = tiles_on(self.config, mesh), mesh.shape[MODEL]
            passes = 1 if sizes.l // parts in tiles else 2  # a tile is recomputed
            for size, count in tiles.items():
                yield LOSS, Traffic("all-reduce", passes * times * count, sizes.B * size * parts, 4)
                yield LOSS, Traffic("reduce-scatter", passes * times * count, 2 * sizes.B * size, 4)
                yield LOSS, Traffic("all-gather", times * count, 2 * sizes.B * size * parts, 4)

    def batch_specs(self) -> Batch:
        return batch_specs(self.packed, self.encoded)

    def batch_like(self, mesh: Mesh | AbstractMesh) -> Batch:
        data = self.config.data
        layout = layout_on(self.config, mesh)
        return batch_like(data.batch_size, data.seq_len, mesh, layout, self.packed, self.encoded)

    def splits(self, mesh: Mesh) -> dict[str, WindowSplit]:
        config, corpus = self.config, open_corpus(self.config.data)
        self._check(corpus)

        def read(windows: Sequence[Window]) -> Batch:
            return read_batch(windows, config.data.seq_len, mesh, layout_on(config, mesh), corpus.token_bytes)

        return {name: WindowSplit(streams, config, read) for name, streams in corpus.streams.items()}

    def _check(self, corpus: Corpus) -> None:
        """Raises a ConfigError if there are more tokens than the model has, or nothing to predict behind the prefix."""
        vocab, prefix = self.config.model.vocab, self.config.attention.prefix
        if corpus.token_bytes is not None and vocab < len(corpus.token_bytes):
            needed = len(corpus.token_bytes)
            raise ConfigError(
                f"model.vocab={vocab} is less than the {needed} tokens of data.tokenizer="
                f"{self.config.data.tokenizer!r}; use model.vocab={needed} or more"
            )
        shortest = min(len(stream.tokens) for streams in corpus.streams.values() for stream in streams)
        if shortest <= prefix:
            raise ConfigError(
                f"attention.prefix={prefix} leaves nothing to predict in a split of {shortest} {self.items}; use a "
                f"shorter prefix or a longer file"
            )

    def inputs(self, batch: Batch) -> jax.Array:
        return batch.tokens

    def positions(self, batch: Batch) -> jax.Array:
        """Natural positions in the window; with `data.restart_positions`, in what the window has of a document."""
        return batch.positions - batch.documents[0] if self.config.data.restart_positions else batch.positions

    def mask(self, positions_l: jax.Array, batch: Batch | None = None) -> Intervals:
        """A causal mask with the config's prefix and window; in packed windows, within a token's own document."""
        attention, seq_len = self.config.attention, self.config.data.seq_len
        mask = prefix_causal(positions_l, attention.prefix) & bidirectional(positions_l, seq_len)
        if attention.window:
            mask &= window(positions_l, attention.window)
        if batch is not None and batch.documents is not None:
            mask &= documents(batch.documents)
        return mask

    def losses(self, outputs: jax.Array, batch: Batch, axis: str | None) -> LossSum | EncodedLossSum:
        loss = self._cross_entropy(outputs, batch, axis)
        if batch.target_bytes is None:
            return loss
        bytes_Bp = own_part(batch.target_bytes, axis, 1) * loss.tokens  # of those that count
        return EncodedLossSum(loss.nats, bytes_Bp, loss.tokens)

    def _cross_entropy(self, outputs: jax.Array, batch: Batch, axis: str | None) -> LossSum:
        in_prefix_l = batch.positions < self.config.attention.prefix - 1  # the mask shows them their targets
        targets_Bl = jnp.where(in_prefix_l, IGNORED, batch.targets)
        if axis and self.config.model.vocab_parallel:
            return vocab_parallel_cross_entropy(outputs, targets_Bl, axis)
        return cross_entropy(outputs, own_part(targets_Bl, axis, 1))
