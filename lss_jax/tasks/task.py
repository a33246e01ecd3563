"""The interface of a task: batch, masks, loss and metrics, for any family of models on any mesh."""

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.mask import Intervals, MaskKind
from lss_jax.attention.setting import SELF, Between
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.traffic import Traffic
from lss_jax.config.schema import Config
from lss_jax.data.split import WindowSplit
from lss_jax.data.text import Tokenizer

Means = Mapping[str, Any]  # a task's sums divided by its count: `loss`, and its other sums under their names

# What a task may need of a model: logits of the vocabulary for each token, which tokens after it cannot reach, or which
# may depend on all; or logits of `model.classes`, for each token or for the whole sequence; or again of the vocabulary,
# from what came before in the sequence and from another one.
NEEDS = {
    "next_token": "predicts each next token",
    "tokens": "predicts tokens from both sides",
    "classes": "predicts a class for each token",
    "pooled": "predicts a class for each sequence",
    "pairs": "predicts each next token of a sequence from a source as well",
}


class Metric(NamedTuple):
    """A metric computed from a task's means; `name` is its key in `metrics.jsonl`."""

    name: str
    unit: str  # on the console: `bits/byte`
    label: str  # on the axis of a figure: `bits per byte`
    of: Callable[[Means], Any]


class Task(abc.ABC):
    """What a config trains on and for: its batch, masks, loss and metrics.

    A batch is a `NamedTuple` of arrays, of which two are every task's: `positions`, int32 `[L]`, the natural positions,
    sharded over `seq`; and `rows`, int32 `[B]`, the number of each sequence in the global batch, sharded over `data`.
    Inside `shard_map` the same names hold local arrays, `[l]` and this device's rows.

    The sums of a task are a `NamedTuple` too: the loss is its first field, the number of items that count is its last.
    Each is summed over the mesh by the gradient law; only then is anything divided.
    """

    needs: str  # of a family: one of `NEEDS`
    sums: Any  # that NamedTuple's class
    items: str  # what the loss counts, in the plural: `bytes`
    metrics: tuple[Metric, ...]  # the first is the loss
    headline: Metric  # the one of them that curves and tables show
    by_position: bool  # whether losses by what came before a position mean anything

    def __init__(self, config: Config):
        self.config = config

    @property
    def text(self) -> Tokenizer | None:
        """What the tokens stand for, read when it is asked for; None: there is no text to generate."""
        return None

    @property
    def mask_kind(self) -> MaskKind | None:
        """What the masks are made of, whatever the batch; None: not said, and only exact attention expresses them."""
        return None

    @property
    def window(self) -> int:
        """The width of the masks' window, 0 for none: some strategies make more of `attention.window` than a mask."""
        attention = self.config.attention
        return 0 if STRATEGIES[attention.strategy].own_window else attention.window

    @property
    def start_token(self) -> int | None:
        """What a text that is generated from a source begins after; None: a text goes on with its prompt."""
        return None

    @property
    def end_token(self) -> int | None:
        """What ends a generated text; None: nothing does."""
        text = self.text
        return text.end if text else None

    @property
    def sums_size(self) -> int:
        """The number of elements of all sums."""
        return len(self.sums._fields)

    def introduction(self, split: WindowSplit) -> Iterator[str]:
        """What a run says of its training data beside their size, a line each."""
        yield from ()

    def counted(self) -> dict[str, Any]:
        """The config keys that decide which items count, with their values: runs may differ in them, to be said."""
        return {}

    def problems(self) -> Iterator[str]:
        """The reasons why the config does not suit this task, a line each."""
        yield from ()

    def traffic(self, mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, Traffic]]:
        """The collectives of the loss over `model` in a training step, each with its scope."""
        yield from ()

    @abc.abstractmethod
    def batch_specs(self) -> Any:
        """The `PartitionSpec` of every array of a batch, `None` for one that this config does not have.

        An array that is sharded over `seq` has its tokens on its last axis, by which it is cut into tiles.
        """

    @abc.abstractmethod
    def batch_like(self, mesh: Mesh | AbstractMesh) -> Any:
        """Global shapes and shardings of a batch, to compile a step before there is data."""

    @abc.abstractmethod
    def splits(self, mesh: Mesh) -> dict[str, WindowSplit]:
        """The data, opened: the splits `train`, `valid` and `test`, which read global batches for this mesh.

        Raises:
          ConfigError: the data cannot be opened, or is too short.
        """

    @abc.abstractmethod
    def inputs(self, batch: Any) -> Any:
        """The model's inputs, from a local batch."""

    def positions(self, batch: Any) -> jax.Array:
        """The positions by which the model tells a local batch's tokens apart, `[l]`, or `[B, l]` if rows differ."""
        return batch.positions

    @abc.abstractmethod
    def mask(self, positions_l: jax.Array, batch: Any = None) -> Intervals:
        """The interval of keys that each local query at these natural positions sees, `[l]` or `[B, l]`.

        Without a batch the window counts as one document: to count operations, and to generate.
        """

    def counted_part(self, batch: Any) -> Any:
        """The arrays of a batch (or their specs) that `losses` needs; the numbers of rows, for one, are for dropout."""
        return batch._replace(rows=None)

    def source_positions(self, batch: Any) -> jax.Array | None:
        """The natural positions `[s]` of a local batch's source, which an encoder-decoder reads; or None."""
        return None

    def mask_between(self, between: Between, positions_l: jax.Array, batch: Any = None) -> Intervals:
        """`mask` of the attention between two sequences, of queries at these natural positions of theirs."""
        assert between == SELF, "a task with a source says what is seen of it"
        return self.mask(positions_l, batch)

    @abc.abstractmethod
    def losses(self, outputs: Any, batch: Any, axis: str | None) -> Any:
        """The terms of the task's sums, one per item of this device: float32 arrays `[B, p]`; `[B, p, C]` by class.

        Args:
          outputs: the model's, for this device's part `p` of its segment, or its vocabulary shard; or for sequences.
          batch: local arrays, of all tokens or of a tile of them: the `counted_part`.
          axis: the mesh axis over which the segment is sharded into parts, None if it is not.
        """


def means_of(sums: Any) -> dict[str, Any]:
    """A task's finished sums divided by its count: `loss`, and the others under their names."""
    count, named = count_of(sums), zip(("loss", *sums._fields[1:-1]), sums[:-1], strict=True)
    return {name: total / count for name, total in named}


def count_of(sums: Any) -> Any:
    """What finished sums are divided by: the number, or the weight, of all items that count; 1 if none does."""
    numpy = jnp if isinstance(sums[-1], jax.Array) else np
    return numpy.where(sums[-1] > 0, sums[-1], 1.0)


def values_of(task: Task, means: Means) -> dict[str, float]:
    """The values of the task's metrics, by name."""
    return {metric.name: float(metric.of(means)) for metric in task.metrics}


def shown(task: Task, values: Mapping[str, Any]) -> str:
    """The task's metrics as text: `loss 2.1994  3.1731 bits/byte`."""
    loss, *others = task.metrics
    return "  ".join([f"loss {values[loss.name]:.4f}", *(f"{values[m.name]:.4f} {m.unit}" for m in others)])
