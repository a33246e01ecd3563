"""A split of the data as batches of windows, drawn by (seed, step) in training and in order in evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

from lss_jax.config.schema import Config
from lss_jax.data.loader import Window
from lss_jax.data.mixture import drawn, in_order, training_windows
from lss_jax.data.packing import Stream
from lss_jax.data.sources import Part, Source


class WindowSplit:
    """Batches of `data.batch_size` windows of `data.seq_len` items; `read` makes one from its windows.

    `streams` are those of the sources, in their order, each with a `Part` of its source as tokens.
    """

    def __init__(self, streams: Sequence[Stream], config: Config, read: Callable[[list[Window]], Any]):
        self.streams, self._read = list(streams), read
        self._data, self._seed = config.data, config.seed
        self._windows = [training_windows(len(stream.tokens), config.data.seq_len) for stream in streams]
        lengths = [len(stream.tokens) for stream in streams]
        self._in_order = in_order(lengths, batch_size=config.data.batch_size, seq_len=config.data.seq_len)

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
        weights = self._data.weights or self._windows
        return [weight / sum(weights) for weight in weights]

    @property
    def documents(self) -> int:
        """The number of documents in all streams, of which one that is not divided is one."""
        return sum(1 if stream.documents is None else len(stream.documents) for stream in self.streams)

    @property
    def batches(self) -> int:
        """The number of evaluation batches, which together predict every item but the first of each stream once."""
        return len(self._in_order)

    def training_batch(self, step: int) -> Any:
        """The global batch of a step (counted from 0), which depends on the seed and the step alone."""
        size, weights = self._data.batch_size, self._data.weights
        return self._of(drawn(step, self._windows, weights, batch_size=size, seed=self._seed))

    def evaluation_batch(self, index: int) -> Any:
        """The global batch `index` of the windows in order."""
        return self._of(self._in_order[index])

    def _of(self, places: Any) -> Any:
        return self._read([Window(self.streams[source], int(n) * self._data.seq_len) for source, n in places])
