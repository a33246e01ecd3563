"""A split of the data as batches of windows, chosen by (seed, step) in training and in order in evaluation."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lss_jax.config.schema import Config
from lss_jax.data.loader import consecutive_starts, shuffled_starts, training_windows
from lss_jax.data.sources import Part


class WindowSplit:
    """Batches of `data.batch_size` windows of `data.seq_len` items; `read` makes one from the windows' starts, `[B]`.

    `documents` is the number of documents in the split, 1 if it is not divided.
    """

    def __init__(self, data: Part, config: Config, read: Callable[[np.ndarray], Any], documents: int = 1):
        self.data, self.documents, self._read = data, documents, read
        self._seed = config.seed
        self._sizes = {"batch_size": config.data.batch_size, "seq_len": config.data.seq_len}
        self._starts = consecutive_starts(len(data), **self._sizes)

    @property
    def batches(self) -> int:
        """The number of evaluation batches, which together predict every item but the first once."""
        return len(self._starts)

    def training_batch(self, step: int) -> Any:
        """The global batch of a step (counted from 0), which depends on the seed and the step alone."""
        windows = training_windows(len(self.data), self._sizes["seq_len"])
        return self._read(shuffled_starts(step, windows=windows, seed=self._seed, **self._sizes))

    def evaluation_batch(self, index: int) -> Any:
        """The global batch `index` of the windows in order."""
        return self._read(self._starts[index])
