"""Sequence to sequence: a target is predicted token by token from a source and from what came before it."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.mask import Intervals, causal, first_keys
from lss_jax.attention.setting import CROSS, IN_SOURCE, SELF, Between
from lss_jax.config.model_rules import indivisible_layers
from lss_jax.config.schema import ConfigError
from lss_jax.data.corpus import Corpus
from lss_jax.data.generated import GENERATED
from lss_jax.data.loader import Read, own_tokens
from lss_jax.data.packing import Stream
from lss_jax.data.pairs import PAIR_SPECS, PairBatch, pairs_like, read_pairs
from lss_jax.data.split import WindowSplit
from lss_jax.data.text import ByteText, Tokenizer
from lss_jax.data.windows import PairWindows, Window
from lss_jax.models.encoder_decoder import Pair
from lss_jax.models.losses import ExactLossSum
from lss_jax.tasks.language_model import no_classes
from lss_jax.tasks.task import Metric
from lss_jax.tasks.token_task import TokenTask, entropy_metrics


class SequenceToSequence(TokenTask):
    """Each token of a target is predicted from all of its source, and from the tokens of the target before it.

    Pairs are documents with a prompt, the source, and an answer, the target; either is cut to the length that the
    config gives its side. The target's first input is a start token, the last one of the model's vocabulary, which also
    ends a target of bytes.
    """

    needs = "pairs"
    sums = ExactLossSum
    metrics = (
        *entropy_metrics("token"),
        Metric("exact", "exact", "share of exact tokens", lambda means: means["exact"]),
    )
    headline = metrics[1]
    by_position = True

    @property
    def text(self) -> Tokenizer | None:
        """What the tokens stand for; random symbols stand for nothing."""
        return None if self.config.data.source in GENERATED else self.tokenizer

    @property
    def start_token(self) -> int:
        return self.config.model.vocab - 1

    @property
    def end_token(self) -> int | None:
        """That of the tokenizer; bytes have none, and their targets end with the start token."""
        text = self.text
        return None if text is None else self.start_token if text.end is None else text.end

    def introduction(self, split: WindowSplit) -> Iterator[str]:
        yield from super().introduction(split)
        data = self.config.data
        lengths_2D = np.concatenate([w.lengths for w in split.windows if isinstance(w, PairWindows)], axis=1)
        cut = np.count_nonzero((lengths_2D > [[data.source_len], [data.seq_len]]).any(0))
        if cut:
            yield (
                f"cut      {cut:,} pairs, with a source longer than data.source_len={data.source_len:,} or a target "
                f"longer than data.seq_len={data.seq_len:,}"
            )

    def counted(self) -> dict[str, Any]:
        return {"data.source_len": self.config.data.source_len}

    def problems(self) -> Iterator[str]:
        model, data = self.config.model, self.config.data
        if data.source in GENERATED:
            yield from self.too_few_tokens(data.symbols + 1, f"data.symbols={data.symbols} with a start token")
        elif not self.encoded:
            yield from self.too_few_tokens(ByteText.vocab + 1, "byte-level data with a start token")
        if data.source not in ("text", "aclsum", *GENERATED):
            yield (
                f"data.source={data.source!r} has no pairs of a source and a target, which task={self.config.task!r} "
                f'needs; use data.source="text" with JSONL or a token file at data.path, "aclsum", "copy" or "reverse"'
            )
        yield from self._unused()
        yield from no_classes(self.config)
        yield from indivisible_layers("model.encoder_layers", model.encoder_layers, model.remat_every)

    def _unused(self) -> Iterator[str]:
        """Keys that mean nothing where each pair is a sequence, and the mask is what it is."""
        data, attention = self.config.data, self.config.attention
        for key, value, unused in (
            ("attention.window", attention.window, 0),
            ("attention.prefix", attention.prefix, 0),
            ("data.separator", data.separator, ""),
            ("data.restart_positions", data.restart_positions, False),
        ):
            if value != unused:
                yield f"{key}={value!r} has no use with task={self.config.task!r}; use {unused!r}"

    def check(self, corpus: Corpus) -> None:
        """Raises a ConfigError if the model has no token left to start with, or no document has a prompt."""
        vocab, tokens = self.config.model.vocab, corpus.token_bytes
        if tokens is not None and vocab <= len(tokens):
            raise ConfigError(
                f"model.vocab={vocab} has no room for a start token beside the {len(tokens)} tokens of data.tokenizer="
                f"{self.config.data.tokenizer!r}; use model.vocab={len(tokens) + 1} or more"
            )
        self.check_prompts(corpus)

    def batch_specs(self) -> PairBatch:
        return PAIR_SPECS

    def batch_like(self, mesh: Mesh | AbstractMesh) -> PairBatch:
        return pairs_like(self.config, mesh)

    def windows(self, stream: Stream) -> PairWindows:
        return PairWindows(stream)

    def reading(self, turn: int) -> Read:
        """How the tokens of sources are read."""
        return own_tokens

    def read(self, windows: Sequence[Window], turn: int, mesh: Mesh, corpus: Corpus) -> PairBatch:
        text = self.text
        end_token = self.end_token if text and text.end is None else None  # others are in the documents
        return read_pairs(
            windows, self.config, mesh, read=self.reading(turn), start_token=self.start_token, end_token=end_token
        )

    def inputs(self, batch: PairBatch) -> Pair:
        return Pair(batch.source, batch.tokens)

    def positions(self, batch: PairBatch) -> jax.Array:
        return batch.positions

    def source_positions(self, batch: PairBatch) -> jax.Array:
        return batch.source_positions

    def mask(self, positions_l: jax.Array, batch: PairBatch | None = None) -> Intervals:
        """A token of the target sees itself and those before it."""
        return self.mask_between(SELF, positions_l, batch)

    def mask_between(self, between: Between, positions_l: jax.Array, batch: PairBatch | None = None) -> Intervals:
        """Every token sees all of the source, and of the target itself and what came before; padding sees nothing."""
        source, target = self.config.data.source_len, self.config.data.seq_len
        if batch is not None:
            source, target = batch.lengths[..., None]
        if between == SELF:
            return causal(positions_l) & first_keys(positions_l, target, target)
        return first_keys(positions_l, {IN_SOURCE: source, CROSS: target}[between], source)

    def counted_part(self, batch: PairBatch) -> PairBatch:
        """Without the source, whose tokens are others than those of the losses."""
        return batch._replace(rows=None, source=None, source_positions=None, lengths=None)

    def losses(self, outputs: jax.Array, batch: PairBatch, axis: str | None) -> ExactLossSum:
        return self.cross_entropy(outputs, batch.targets, axis)
