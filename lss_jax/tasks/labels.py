"""Classes, as tasks with labels learn them: weighted cross-entropy, accuracy, and each class's Dice coefficient."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lss_jax.config.schema import Config
from lss_jax.data.batch import IGNORED
from lss_jax.tasks.task import Means, Metric
from lss_jax.tasks.token_task import BidirectionalTask


class LabelSums(NamedTuple):
    """Sums over labelled items, float32; those with a last axis are by class."""

    nats: Any  # weighted by the class of the label
    right: Any  # [..., C], items of a class that were taken for it
    predicted: Any  # [..., C], items that were taken for a class
    labelled: Any  # [..., C], items of a class
    weight: Any  # of the classes of all items


class LabelTask(BidirectionalTask):
    """A task whose labels are classes, of tokens or of sequences."""

    sums = LabelSums
    names: tuple[str, ...]  # of the classes

    @property
    def sums_size(self) -> int:
        return 2 + 3 * len(self.names)


def label_sums(logits_BpC: jax.Array, labels_Bp: jax.Array, weights: Sequence[float]) -> LabelSums:
    """The terms of the sums for each item, zero where the label is `IGNORED`; without weights classes count alike."""
    classes = logits_BpC.shape[-1]
    weight_C = jnp.array(weights or (1.0,) * classes, jnp.float32)
    label_BpC = jax.nn.one_hot(labels_Bp, classes)  # zeros where there is none
    choice_BpC = jax.nn.one_hot(jnp.argmax(logits_BpC, axis=-1), classes)
    counted_Bp1 = (labels_Bp != IGNORED)[..., None]
    weight_Bp = jnp.sum(weight_C * label_BpC, axis=-1)
    nats_Bp = -jnp.sum(label_BpC * jax.nn.log_softmax(logits_BpC), axis=-1)
    return LabelSums(
        nats=weight_Bp * nats_Bp,
        right=choice_BpC * label_BpC,
        predicted=jnp.where(counted_Bp1, choice_BpC, 0.0),
        labelled=label_BpC,
        weight=weight_Bp,
    )


def label_metrics(names: Sequence[str], item: str) -> tuple[Metric, ...]:
    """Loss, accuracy, the mean Dice coefficient, and that of each class; `item` is what has a label, in the singular.

    The Dice coefficient of a class, of two sets of items, is also known as its F1 score. It is nan for a class that
    neither occurs nor is predicted, and such a class is left out of the mean.
    """
    metrics = [
        Metric("loss", f"nats/{item}", f"nats per {item}", lambda means: means["loss"]),
        Metric("accuracy", "accuracy", f"share of {item}s with the right class", _accuracy),
        Metric("dice", "mean Dice", "Dice coefficient, mean of classes", _mean_dice),
    ]
    for number, name in enumerate(names):
        metrics.append(Metric(f"dice_{name}", f"Dice {name}", f"Dice coefficient, {name}", _dice_of(number)))
    return tuple(metrics)


def _accuracy(means: Means) -> Any:
    labelled = float(means["labelled"].sum())
    return float(means["right"].sum()) / labelled if labelled else math.nan


def _dice(means: Means) -> np.ndarray:
    """The Dice coefficient of each class, `[C]`."""
    both_C = np.asarray(means["predicted"] + means["labelled"], np.float64)
    twice_C = 2 * np.asarray(means["right"], np.float64)
    return np.divide(twice_C, both_C, out=np.full_like(both_C, np.nan), where=both_C > 0)


def _mean_dice(means: Means) -> float:
    of_classes = _dice(means)
    found = of_classes[~np.isnan(of_classes)]
    return float(found.mean()) if len(found) else math.nan


def _dice_of(number: int) -> Any:
    return lambda means: _dice(means)[number]


def class_problems(config: Config, names: Sequence[str], pooling: str) -> Iterator[str]:
    """What of a config does not suit a task with these classes; each an error."""
    classes, labels = config.model.classes, config.labels
    if not names:
        yield f"task={config.task!r} needs the names of its classes; give labels.names, as in 'no,yes'"
    elif len(set(names)) < len(names) or "" in names:
        yield f"labels.names={labels.names!r} must be different names with commas between; write them as in 'no,yes'"
    elif classes != len(names):
        yield (
            f"model.classes={classes}, but there are {len(names)} classes ({', '.join(names)}); "
            f"use model.classes={len(names)}"
        )
    if labels.weights and len(labels.weights) != len(names):
        yield (
            f"labels.weights={labels.weights} are {len(labels.weights)} numbers for {len(names)} classes; "
            f"give one to each, or ()"
        )
    if not all(0 <= weight < float("inf") for weight in labels.weights) or (labels.weights and not any(labels.weights)):
        yield f"labels.weights={labels.weights} must be at least 0 and finite, and not all 0"
    if config.model.pooling != pooling:
        yield (
            f"model.pooling={config.model.pooling!r} does not suit task={config.task!r}; use model.pooling={pooling!r}"
        )
