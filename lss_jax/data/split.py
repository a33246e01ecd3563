"""A split of the data as batches of windows, drawn by (seed, step) in training and in order in evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

from lss_jax.config.schema import Config
from lss_jax.data.mixture import drawn, in_order
from lss_jax.data.sources import Part, Source
from lss_jax.data.windows import Window, Windows

EVALUATION = 2**31  # the turn of the first evaluation batch

Read = Callable[[list[Window], int], Any]


class WindowSplit:
    """Batches of `data.batch_size` windows; `read(windows, turn)` makes one from its windows.

    What is random in a batch is a hash of the seed and its turn: the training step, or `EVALUATION` plus the batch's
    number. `windows` are those of the sources, in their order.
    """

    def __init__(self, windows: Sequence[Windows], config: Config, read: Read):
        self.streams, self.windows, self._read = [each.stream for each in windows], list(windows), read
        self._data, self._seed = config.data, config.seed
        self._training = [each.training for each in windows]
        self._in_order = in_order([each.evaluation for each in windows], batch_size=config.data.batch_size)

    def __len__(self) -> int:
        """The number of items in all streams."""
        return sum(len(stream.tokens) for stream in self.streams)

    @property
    def sources(self) -> list[Source]:
        """The sources that the streams are parts of."""
        return [stream.tokens.source for stream in self.streams if isinstance(stream.tokens, Part)]

    @property
    def shares(self) -> list[float]:
        """The share of each stream in the training windows."""
        weights = self._data.weights or self._training
        return [weight / sum(weights) for weight in weights]

    @property
    def documents(self) -> int:
        """The number of documents in all streams, of which one that is not divided is one."""
        return sum(1 if stream.documents is None else len(stream.documents) for stream in self.streams)

    @property
    def batches(self) -> int:
        """The number of evaluation batches, which together have every window of each stream once."""
        return len(self._in_order)

    def training_batch(self, step: int) -> Any:
        """The global batch of a step (counted from 0), which depends on the seed and the step alone."""
        size, weights = self._data.batch_size, self._data.weights
        return self._of(drawn(step, self._training, weights, batch_size=size, seed=self._seed), step)

    def evaluation_windows(self, index: int) -> list[Window]:
        """The windows of the batch `index`, behind the last one without tokens."""
        return [self.windows[source][int(number)] for source, number in self._in_order[index]]

    def evaluation_batch(self, index: int) -> Any:
        """The global batch `index` of the windows in order."""
        return self._of(self._in_order[index], EVALUATION + index)

    def _of(self, places: Any, turn: int) -> Any:
        return self._read([self.windows[source][int(number)] for source, number in places], turn)
