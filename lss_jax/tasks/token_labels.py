"""A class for each token: segmentation of images, genes along a genome, tags of words."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.batch import Batch
from lss_jax.data.corpus import Corpus
from lss_jax.data.image_sources import IMAGES
from lss_jax.data.images import check_labels, grid_of
from lss_jax.data.kinds import KINDS
from lss_jax.data.loader import Read, labelled
from lss_jax.data.split import WindowSplit
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks.labels import LabelSums, LabelTask, class_problems, label_metrics, label_sums


class TokenLabels(LabelTask):
    """Each token's class is predicted from all tokens; the model's outputs are logits `BpC`.

    If tokens are patches of images, each of their pixels has a class, and logits are `Bp(PC)`.
    """

    needs = "classes"

    def __init__(self, config: Config):
        super().__init__(config)
        self.names = config.labels.classes or (self.kind and self.kind.classes) or ()
        self.metrics = label_metrics(self.names, self.items.removesuffix("s"))
        self.items = "patches" if config.data.patch > 1 else self.items
        self.headline = self.metrics[2]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        data = self.config.data
        if self.kind is None or self.kind.classes is None:
            yield (
                f"data.source={data.source!r} has no labels of tokens, which task={self.config.task!r} needs; "
                f"use one of {', '.join(repr(name) for name, kind in KINDS.items() if kind.classes is not None)}"
            )
        else:
            yield from class_problems(self.config, self.names, pooling="none")

    def check(self, corpus: Corpus) -> None:
        """Raises a ConfigError for tokens that do not fit the model, without labels, or with none of its classes."""
        super().check(corpus)
        for split, streams in corpus.streams.items():
            if any(stream.labels is None for stream in streams):
                raise ConfigError(
                    f"data.path={self.config.data.path!r}: {self.items} of the split {split!r} have no labels, which "
                    f"task={self.config.task!r} needs; give annotated files (GenBank), or their data.annotation (GFF3)"
                )
            for stream in streams:
                check_labels(split, stream, self.config.model.classes)

    def introduction(self, split: WindowSplit) -> Iterator[str]:
        yield from super().introduction(split)
        for stream, windows in zip(split.streams, split.windows, strict=True):
            grid = grid_of(stream)
            if grid is not None:
                images = len(stream.tokens) // (grid.rows * grid.columns)
                yield f"windows  {windows.training:,} of {grid.window_rows} rows of tokens, of {images:,} {grid.shown}"

    def reading(self, turn: int) -> Read:
        return labelled

    @property
    def has_images(self) -> bool:
        """Whether tokens are pixels, or patches of them."""
        return self.config.data.source in IMAGES

    def losses(self, outputs: jax.Array, batch: Batch, axis: str | None) -> LabelSums:
        labels = own_part(batch.targets, axis, batch.targets.ndim - 1)
        if not self.patch_pixels:
            return label_sums(outputs, labels, self.config.labels.weights)
        sums = label_sums(self._by_pixel(outputs), jnp.moveaxis(labels, 0, 2), self.config.labels.weights)
        return jax.tree.map(lambda of_pixels: of_pixels.sum(2), sums)

    def predictions(self, outputs: jax.Array) -> jax.Array:
        """The most probable class of each token, uint8 `[B, p]`, or of each pixel of it, `[B, p, P]`."""
        logits = self._by_pixel(outputs) if self.patch_pixels else outputs
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8)

    def _by_pixel(self, logits: jax.Array) -> jax.Array:
        """Logits of patches `[B, p, PC]` as those of their pixels, `[B, p, P, C]`."""
        return logits.reshape(*logits.shape[:2], self.patch_pixels, -1)
