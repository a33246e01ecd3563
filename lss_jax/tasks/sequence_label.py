"""A class for each sequence: documents with a label each, from JSONL (`data.prompt_field` and `data.answer_field`)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.attention.mask import MaskKind
from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.batch import IGNORED, Batch
from lss_jax.data.corpus import Corpus
from lss_jax.data.loader import Read, own_tokens
from lss_jax.data.packing import Stream
from lss_jax.data.split import WindowSplit
from lss_jax.data.text import decoded
from lss_jax.data.windows import PairWindows, PromptWindows, Window, sides
from lss_jax.parallel.mesh import DATA, shardings
from lss_jax.tasks.labels import LabelSums, LabelTask, class_problems, label_metrics, label_sums

SHOWN = 40  # letters of a label that is none


class LabelledBatch(NamedTuple):
    """The arrays of a batch, all int32, as in `Batch`; each row is one document."""

    tokens: Any  # [B, L]
    positions: Any  # [L], natural
    rows: Any  # [B]
    documents: Any  # [2, B, L]; padding has (0, 0)
    labels: Any  # [B], the number of each document's class, or `IGNORED`


class SequenceLabel(LabelTask):
    """Each document's class is predicted from all of its tokens; the model's outputs are logits `BC`.

    A document is what stands in `data.prompt_field`, cut to `data.seq_len` tokens; the name of its class, one of
    `labels.names`, stands in `data.answer_field`.
    """

    needs = "pooled"

    def __init__(self, config: Config):
        super().__init__(config)
        self.names = config.labels.classes
        self.metrics = label_metrics(self.names, "document")
        self.headline = self.metrics[1]

    @property
    def mask_kind(self) -> MaskKind:
        return super().mask_kind._replace(documents=False)  # each row is one

    def introduction(self, split: WindowSplit) -> Iterator[str]:
        yield from super().introduction(split)
        length = self.config.data.seq_len
        prompts = [windows.lengths[0] for windows in split.windows if isinstance(windows, PairWindows)]
        longer = sum(int(np.count_nonzero(lengths_D > length)) for lengths_D in prompts)
        if longer:
            yield f"truncated  {longer:,} documents of the training data, which are longer than data.seq_len={length:,}"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        data = self.config.data
        if not data.prompt_field:
            yield (
                f"task={self.config.task!r} needs documents with labels; give JSONL with the document in "
                f"data.prompt_field and the name of its class in data.answer_field"
            )
        if data.restart_positions:
            yield "data.restart_positions=True has no use where each document is a sequence; use False"
        yield from class_problems(self.config, self.names, pooling="mean")

    def batch_specs(self) -> LabelledBatch:
        return _of(super().batch_specs(), P(DATA))

    def batch_like(self, mesh: Mesh | AbstractMesh) -> LabelledBatch:
        placed = shardings(P(DATA), mesh)
        labels = jax.ShapeDtypeStruct((self.config.data.batch_size,), np.int32, sharding=placed)
        return _of(super().batch_like(mesh), labels)

    def windows(self, stream: Stream) -> PromptWindows:
        return PromptWindows(stream, self.config.data.seq_len)

    def read(self, windows: Sequence[Window], turn: int, mesh: Mesh, corpus: Corpus) -> LabelledBatch:
        like = self.batch_like(mesh).labels

        def labels(index: Any) -> np.ndarray:
            return np.array([self._label(window) for window in windows[index[0]]], np.int32)

        batch = super().read(windows, turn, mesh, corpus)
        return _of(batch, jax.make_array_from_callback(like.shape, like.sharding, labels))

    def check(self, corpus: Corpus) -> None:
        """Raises a ConfigError if there are more tokens than the model has, or a label that is none of the classes."""
        super().check(corpus)
        self.check_prompts(corpus)
        for name, streams in corpus.streams.items():
            for stream in streams:
                self._check_labels(name, self.windows(stream))

    def _check_labels(self, split: str, windows: PromptWindows) -> None:
        for number in range(windows.evaluation):
            answer = self._answer(windows[number])
            if answer not in self.names:
                raise ConfigError(
                    f"data.answer_field={self.config.data.answer_field!r}: document {number + 1} of the split "
                    f"{split!r} has the label {answer[:SHOWN]!r}, which is none of "
                    f"labels.names={self.config.labels.names!r}; add it there, or mend the document"
                )

    def _answer(self, window: Window) -> str:
        documents = window.stream.documents
        assert documents is not None
        _, (stream, first, stop) = sides(Window(window.stream, *documents[documents.number(window.start)]))
        return decoded(self.tokenizer, stream.tokens[first:stop])

    def _label(self, window: Window) -> int:
        return self.names.index(self._answer(window)) if window.start < len(window.stream.tokens) else IGNORED

    def reading(self, turn: int) -> Read:
        return own_tokens

    def losses(self, outputs: jax.Array, batch: LabelledBatch, axis: str | None) -> LabelSums:
        return label_sums(outputs[:, None], batch.labels[:, None], self.config.labels.weights)


def _of(batch: Batch, labels: Any) -> LabelledBatch:
    return LabelledBatch(batch.tokens, batch.positions, batch.rows, batch.documents, labels)
