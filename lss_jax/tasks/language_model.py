"""Language modelling over bytes: each next byte is predicted from those that the mask shows."""

import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.mask import Intervals, bidirectional, documents, prefix_causal, window
from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.schema import ConfigError
from lss_jax.data.batch import IGNORED, Batch, batch_like, batch_specs
from lss_jax.data.loader import document_edges, read_batch
from lss_jax.data.sources import Part, open_splits
from lss_jax.data.split import WindowSplit
from lss_jax.data.text import BYTES, ByteText, Tokenizer
from lss_jax.data.tokenizer import load_tokenizer
from lss_jax.models.losses import LossSum, cross_entropy, vocab_parallel_cross_entropy
from lss_jax.models.tiles import tiles_on
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import LOSS
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks.task import Metric, Task

NATS = Metric("loss", "nats/byte", "nats per byte", lambda means: means["loss"])
BITS = Metric("bits_per_byte", "bits/byte", "bits per byte", lambda means: means["loss"] / math.log(2))


class LanguageModel(Task):
    """Next-token prediction. The model's outputs are logits, `BpV`, or `BlV` for this device's vocabulary shard."""

    sums = LossSum
    items: ClassVar[str] = "bytes"
    metrics: ClassVar[tuple[Metric, ...]] = (NATS, BITS)
    headline: ClassVar[Metric] = BITS

    @functools.cached_property
    def text(self) -> Tokenizer:
        """What the tokens stand for.

        Raises:
          ConfigError: the file of the tokenizer cannot be used.
        """
        return load_tokenizer(self.config.data.tokenizer)

    @property
    def packed(self) -> bool:
        """Whether windows hold several documents, which do not attend to one another."""
        return bool(self.config.data.separator)

    def introduction(self, split: WindowSplit) -> Iterator[str]:
        if self.packed:
            ends = repr(self.config.data.separator)
            yield f"packed   {split.documents:,} documents in the training data, each ending with {ends}"

    def counted(self) -> dict[str, Any]:
        return {"attention.prefix": self.config.attention.prefix, "data.separator": self.config.data.separator}

    def problems(self) -> Iterator[str]:
        vocab, needed = self.config.model.vocab, ByteText.vocab
        if vocab < needed and self.config.data.tokenizer == BYTES:
            yield f"model.vocab={vocab} is less than {needed}, which byte-level data needs; use model.vocab={needed}"

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
        return batch_specs(self.packed)

    def batch_like(self, mesh: Mesh | AbstractMesh) -> Batch:
        data = self.config.data
        return batch_like(data.batch_size, data.seq_len, mesh, layout_on(self.config, mesh), self.packed)

    def splits(self, mesh: Mesh) -> dict[str, WindowSplit]:
        return {name: self.split(part, mesh) for name, part in open_splits(self.config.data).items()}

    def split(self, data: Part, mesh: Mesh) -> WindowSplit:
        """One split as batches of windows; with `data.separator` it is scanned for documents.

        Raises:
          ConfigError: the separator does not occur, or there is nothing to predict behind the prefix.
        """
        config, edges = self.config, document_edges(data.mapped(), self.config.data.separator)
        if len(data) <= config.attention.prefix:
            raise ConfigError(
                f"attention.prefix={config.attention.prefix} leaves nothing to predict in a split of {len(data)} "
                f"bytes; use a shorter prefix or a longer file"
            )

        def read(starts_B: np.ndarray) -> Batch:
            return read_batch(data, starts_B, config.data.seq_len, mesh, layout_on(config, mesh), edges)

        return WindowSplit(data, config, read, 1 if edges is None else len(edges) - 1)

    def inputs(self, batch: Batch) -> jax.Array:
        return batch.tokens

    def mask(self, positions_l: jax.Array, batch: Batch | None = None) -> Intervals:
        """A causal mask with the config's prefix and window; in packed windows, within a token's own document."""
        attention, seq_len = self.config.attention, self.config.data.seq_len
        mask = prefix_causal(positions_l, attention.prefix) & bidirectional(positions_l, seq_len)
        if attention.window:
            mask &= window(positions_l, attention.window)
        if batch is not None and batch.documents is not None:
            mask &= documents(batch.documents)
        return mask

    def losses(self, outputs: jax.Array, batch: Batch, axis: str | None) -> LossSum:
        in_prefix_l = batch.positions < self.config.attention.prefix - 1  # the mask shows them their targets
        targets_Bl = jnp.where(in_prefix_l, IGNORED, batch.targets)
        if axis and self.config.model.vocab_parallel:
            return vocab_parallel_cross_entropy(outputs, targets_Bl, axis)
        return cross_entropy(outputs, own_part(targets_Bl, axis, 1))
