"""What a task is: what is learned from what, for any family of models on any mesh."""

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lss_jax.attention.mask import Intervals
from lss_jax.config.schema import Config
from lss_jax.data.split import WindowSplit

Means = Mapping[str, Any]  # a task's sums over its count: `loss`, and its other sums under their names


class Metric(NamedTuple):
    """A number of a run, by its name in `metrics.jsonl`."""

    name: str
    unit: str  # as a line on the console has it: `bits/byte`
    label: str  # as an axis of a figure has it: `bits per byte`
    of: Callable[[Means], Any]


class Task(abc.ABC):
    """Batch, masks, loss and metrics of a config.

    A batch is a `NamedTuple` of arrays, of which two are every task's: `positions`, int32 `[L]`, the natural positions,
    sharded over `seq`; and `rows`, int32 `[B]`, the number of each sequence in the global batch, sharded over `data`.
    Inside `shard_map` the same names hold local arrays, `[l]` and this device's rows.

    The sums of a task are a `NamedTuple` too: the loss is its first field, the number of items that count is its last.
    Each is summed over the mesh by the gradient law; only then is anything divided.
    """

    items: ClassVar[str]  # what the loss counts, in the plural: `bytes`
    metrics: ClassVar[tuple[Metric, ...]]  # the first is the loss
    headline: ClassVar[Metric]  # the one of them that curves and tables show

    def __init__(self, config: Config):
        self.config = config

    def problems(self) -> Iterator[str]:
        """What of the config does not suit this task, a line each."""
        yield from ()

    @abc.abstractmethod
    def batch_specs(self) -> Any:
        """The `PartitionSpec` of every array of a batch, `None` for one that this config does not have."""

    @abc.abstractmethod
    def batch_like(self, mesh: Mesh) -> Any:
        """Global shapes and shardings of a batch, to compile a step before there is data."""

    @abc.abstractmethod
    def splits(self, mesh: Mesh) -> dict[str, WindowSplit]:
        """The data, opened: the splits `train`, `valid` and `test`, which read global batches for this mesh.

        Raises:
          ConfigError: the data cannot be opened, or is too short.
        """

    @abc.abstractmethod
    def inputs(self, batch: Any) -> Any:
        """What of a local batch goes into the model."""

    @abc.abstractmethod
    def mask(self, positions_l: jax.Array, batch: Any = None) -> Intervals:
        """Which keys the local queries at these positions see, `[l]` or `[B, l]`.

        Without a batch, what they see of a window that is not divided: to count operations, and to generate.
        """

    @abc.abstractmethod
    def losses(self, outputs: Any, batch: Any, axis: str | None) -> Any:
        """The sums before they are summed: each a float32 array `[B, p]` over this device's items.

        Args:
          outputs: of the model, for this device's part `p` of its segment.
          batch: local arrays.
          axis: the mesh axis over which the segment is sharded in turn, None if it is not.
        """


def means_of(sums: Any) -> dict[str, Any]:
    """A task's finished sums over its count: `loss`, and the others under their names."""
    count = max(sums[-1], 1.0) if isinstance(sums[-1], float) else jnp.maximum(sums[-1], 1.0)
    named = zip(("loss", *sums._fields[1:-1]), sums[:-1], strict=True)
    return {name: total / count for name, total in named}


def values_of(task: Task, means: Means) -> dict[str, float]:
    """The task's metrics, under their names."""
    return {metric.name: float(metric.of(means)) for metric in task.metrics}


def shown(task: Task, values: Mapping[str, Any]) -> str:
    """The task's metrics on a line: `loss 2.1994  3.1731 bits/byte`."""
    loss, *others = task.metrics
    return "  ".join([f"loss {values[loss.name]:.4f}", *(f"{values[m.name]:.4f} {m.unit}" for m in others)])
