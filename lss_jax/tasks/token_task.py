"""What tasks on windows of tokens have in common: their batches, documents and positions, and losses per token."""

import abc
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.mask import Intervals, MaskKind, bidirectional, documents, neighbours
from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.bases import on_either_strand
from lss_jax.data.batch import Batch, batch_like, batch_specs
from lss_jax.data.corpus import Corpus
from lss_jax.data.generated import GENERATED
from lss_jax.data.images import check_columns
from lss_jax.data.kinds import KINDS, is_packed, open_corpus
from lss_jax.data.loader import Read, read_batch, without_target
from lss_jax.data.packing import Stream, undivided
from lss_jax.data.split import EVALUATION, WindowSplit
from lss_jax.data.text import Tokenizer
from lss_jax.data.tokenizer import OF_LETTERS, load_tokenizer
from lss_jax.data.windows import EqualWindows, Window, Windows, WindowsOfDocuments
from lss_jax.models.losses import ExactLossSum, cross_entropy, vocab_parallel_cross_entropy
from lss_jax.models.tiles import tiles_on
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import LOSS
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks.task import Metric, Task


def entropy_metrics(item: str, described: str = "") -> tuple[Metric, Metric]:
    """Nats and bits per item, which is a byte, a base or a token; figures may describe it in more words."""
    said = described or item
    return (
        Metric("loss", f"nats/{item}", f"nats per {said}", lambda means: means["loss"]),
        Metric(f"bits_per_{item}", f"bits/{item}", f"bits per {said}", lambda means: means["loss"] / math.log(2)),
    )


class TokenTask(Task):
    """A task on windows of `data.seq_len` tokens, which are letters (bytes, bases) or those of a tokenizer."""

    by_position = False
    ahead = 0  # the tokens behind a window that are targets in it
    sees_documents: bool  # whether batches say which documents their windows hold, be it only one
    counts_bytes = False  # whether they say how many bytes of text each target stands for

    def __init__(self, config: Config):
        super().__init__(config)
        letters = OF_LETTERS.get(config.data.tokenizer)
        self.encoded, self.kind = letters is None, KINDS.get(config.data.source)
        self.items = self.kind.items if self.kind else letters.items if letters else "tokens"
        self.sees_documents = self.packed = config.data.pack and is_packed(config.data)
        self.patch_pixels = config.data.pixels if config.data.patch else 0

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the config.

        Raises:
          ConfigError: its file cannot be used.
        """
        return load_tokenizer(self.config.data.tokenizer)

    @property
    def text(self) -> Tokenizer | None:
        return self.tokenizer

    def check_prompts(self, corpus: Corpus) -> None:
        """Raises a ConfigError for data without prompts and answers."""
        data = self.config.data
        for stream in corpus.streams["train"]:
            if stream.documents is None or not np.any(stream.documents.lengths()[0] > 1):
                raise ConfigError(
                    f"data.path={data.path!r} has a part without prompts, which task={self.config.task!r} needs; give "
                    f"JSONL with data.prompt_field and data.answer_field, or a token file that was encoded with them"
                )

    def introduction(self, split: WindowSplit) -> Iterator[str]:
        if self.packed and any(isinstance(windows, EqualWindows) for windows in split.windows):
            separator = self.config.data.separator
            ends = f", each ending with {separator!r}" if separator else ""
            yield f"packed   {split.documents:,} documents in the training data{ends}"
        shares = split.shares
        if shares[1:]:
            for part, stream, share in zip(self.config.data.parts, split.streams, shares, strict=True):
                yield f"source   {share:.1%} of the windows from {part}, {len(stream.tokens):,} {self.items}"

    def counted(self) -> dict[str, Any]:
        return {"data.separator": self.config.data.separator}

    def problems(self) -> Iterator[str]:
        data = self.config.data
        if data.source in GENERATED:
            yield (
                f"data.source={data.source!r} has pairs of symbols, which task={self.config.task!r} is not for; use "
                f'task="sequence_to_sequence", or another data.source'
            )
        elif not self.encoded:
            yield from self.too_few_tokens(self.tokenizer.vocab, f"data of {self.items}")
        if data.patch and self.needs != "classes":
            yield (
                f"data.patch={data.patch} makes vectors of pixels of tokens, which task={self.config.task!r} cannot "
                f"predict; use data.patch=0"
            )
        if not data.pack and not is_packed(data):
            yield f"data.pack=False has no use with data.source={data.source!r}, which is one document; use True"
        if data.restart_positions and not self.packed:
            yield (
                f"data.restart_positions=True has no use with data.source={data.source!r}, data.path={data.path!r}, "
                f"which is one document; give a data.separator or several documents, or use False"
            )

    def too_few_tokens(self, needed: int, what: str) -> Iterator[str]:
        """Whether the model has fewer tokens than `what` needs."""
        if self.config.model.vocab < needed:
            vocab = self.config.model.vocab
            yield f"model.vocab={vocab} is less than {needed}, which {what} needs; use model.vocab={needed}"

    def batch_specs(self) -> Any:
        patched = self.patch_pixels > 0
        return batch_specs(packed=self.sees_documents, encoded=self.counts_bytes, patched=patched)

    def batch_like(self, mesh: Mesh | AbstractMesh) -> Any:
        data, layout = self.config.data, layout_on(self.config, mesh)
        has: dict[str, Any] = {"packed": self.sees_documents, "encoded": self.counts_bytes}
        return batch_like(data.batch_size, data.seq_len, mesh, layout, **has, patch_pixels=self.patch_pixels)

    def splits(self, mesh: Mesh) -> dict[str, WindowSplit]:
        config, corpus = self.config, open_corpus(self.config.data)
        self.check(corpus)

        def read(windows: Sequence[Window], turn: int) -> Any:
            return self.read(windows, turn, mesh, corpus)

        return {
            name: WindowSplit([self.windows(self._divided(stream)) for stream in streams], config, read)
            for name, streams in corpus.streams.items()
        }

    def _divided(self, stream: Stream) -> Stream:
        needs_one = self.sees_documents and stream.documents is None
        return stream._replace(documents=undivided()) if needs_one else stream

    def read(self, windows: Sequence[Window], turn: int, mesh: Mesh, corpus: Corpus) -> Any:
        """The global batch of some windows; see `WindowSplit` for its turn."""
        if self.config.data.reverse_complement and turn < EVALUATION:
            windows = on_either_strand(windows, self.config.seed, turn)
        token_bytes = corpus.token_bytes if self.counts_bytes else None
        layout, reading = layout_on(self.config, mesh), self.reading(turn)
        has: dict[str, Any] = {"token_bytes": token_bytes, "patch_pixels": self.patch_pixels}
        has |= {"documents": self.sees_documents}
        return read_batch(windows, self.config.data.seq_len, mesh, layout, read=reading, **has)

    def windows(self, stream: Stream) -> Windows:
        """The windows of a stream: of all of it, or with `data.pack=False` of each document."""
        kind = EqualWindows if self.config.data.pack or stream.documents is None else WindowsOfDocuments
        return kind(stream, self.config.data.seq_len, self.ahead)

    @abc.abstractmethod
    def reading(self, turn: int) -> Read:
        """How tokens and targets are read from the windows of a batch."""

    def learned(self, read: Read) -> Read:
        """How tokens and targets are read where these are tokens: without the one that is never learned."""
        unlearned = self.tokenizer.unlearned
        return read if unlearned is None else without_target(read, unlearned)

    def check(self, corpus: Corpus) -> None:
        """Raises a ConfigError if the model has fewer tokens than there are, or rotates by rows of another length."""
        for streams in corpus.streams.values():
            for stream in streams:
                check_columns(stream, self.config.model.rope_columns)
        if corpus.token_bytes is None:
            return
        needed = len(corpus.token_bytes)
        if self.config.model.vocab < needed:
            raise ConfigError(
                f"model.vocab={self.config.model.vocab} is less than the {needed} tokens of data.tokenizer="
                f"{self.config.data.tokenizer!r}; use model.vocab={needed} or more"
            )

    def inputs(self, batch: Any) -> Any:
        return batch.tokens

    def positions(self, batch: Any) -> jax.Array:
        """Natural positions in the window; with `data.restart_positions`, in what the window has of a document."""
        return batch.positions - batch.documents[0] if self.config.data.restart_positions else batch.positions

    def cross_entropy(self, outputs: jax.Array, targets_Bl: jax.Array, axis: str | None) -> ExactLossSum:
        """The losses of this device's part, from logits of the vocabulary or this device's shard of it."""
        if axis and self.config.model.vocab_parallel:
            return vocab_parallel_cross_entropy(outputs, targets_Bl, axis)
        return cross_entropy(outputs, own_part(targets_Bl, axis, 1))

    def traffic(self, mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, Traffic]]:
        """Over a sharded vocabulary two sums and a maximum per token, and the gradient of the two."""
        if self.config.model.vocab_parallel and not self.config.model.classes:
            sizes, times = sizes_of(self.config, mesh), self.config.optim.accumulate
            tiles, parts = tiles_on(self.config, mesh), mesh.shape[MODEL]
            passes = 1 if sizes.l // parts in tiles else 2  # a tile is recomputed
            for size, count in tiles.items():
                yield LOSS, Traffic("all-reduce", passes * times * count, sizes.B * size * parts, 4)
                yield LOSS, Traffic("reduce-scatter", passes * times * count, 2 * sizes.B * size, 4)
                yield LOSS, Traffic("all-gather", times * count, 2 * sizes.B * size * parts, 4)


class BidirectionalTask(TokenTask):
    """A task in which each token may attend to all others of its document, or to those in a window around it."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.sees_documents = True  # what lies behind the end of the data is padding, which nobody attends to

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        prefix = self.config.attention.prefix
        if prefix:
            yield (
                f"attention.prefix={prefix} has no use with task={self.config.task!r}, where all tokens attend to one "
                f"another; use 0"
            )

    @property
    def mask_kind(self) -> MaskKind:
        return MaskKind(causal=False, window=self.window, prefix=0, documents=self.packed, padded=True)

    def mask(self, positions_l: jax.Array, batch: Batch | None = None) -> Intervals:
        """A bidirectional mask within a token's own document, and in the config's window around it."""
        width = self.window
        mask = bidirectional(positions_l, self.config.data.seq_len)
        if width:
            mask &= neighbours(positions_l, left=width // 2, right=(width - 1) // 2)
        return mask & documents(batch.documents) if batch is not None else mask
