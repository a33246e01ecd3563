"""A class for each token: segmentation of images, genes along a genome, tags of words."""

from collections.abc import Iterator

import jax

from lss_jax.config.schema import Config
from lss_jax.data.batch import Batch
from lss_jax.data.corpus import KINDS
from lss_jax.data.loader import Read, labelled
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks.labels import LabelSums, class_problems, label_metrics, label_sums
from lss_jax.tasks.token_task import BidirectionalTask


class TokenLabels(BidirectionalTask):
    """Each token's class is predicted from all tokens; the model's outputs are logits `BpC`."""

    needs = "classes"
    sums = LabelSums

    def __init__(self, config: Config):
        super().__init__(config)
        kinds = [kind for source, kind in KINDS.items() if source == config.data.source]  # none, or one
        self.names = config.labels.classes or next((kind.classes for kind in kinds), ())
        self.items = next((kind.items for kind in kinds), "tokens")
        self.metrics = label_metrics(self.names, self.items.removesuffix("s"))
        self.headline = self.metrics[2]

    @property
    def sums_size(self) -> int:
        return 2 + 3 * len(self.names)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        data = self.config.data
        if data.source not in KINDS:
            yield (
                f"data.source={data.source!r} has no labels of tokens, which task={self.config.task!r} needs; "
                f"use one of {', '.join(map(repr, KINDS))}"
            )
        else:
            yield from class_problems(self.config, self.names, pooling="none")

    def reading(self, turn: int) -> Read:
        return labelled

    def losses(self, outputs: jax.Array, batch: Batch, axis: str | None) -> LabelSums:
        return label_sums(outputs, own_part(batch.targets, axis, 1), self.config.labels.weights)
