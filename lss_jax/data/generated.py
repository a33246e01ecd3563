"""Sources without a file: documents of random symbols, each a prompt and its copy, or the prompt reversed.

They are what an encoder-decoder learns first, at any length, and are the same on every machine: a symbol is a hash of
the number of its document and of its position in the prompt.
"""

import numpy as np

from lss_jax.config.schema import DataConfig
from lss_jax.data.packing import Packing, Stream
from lss_jax.parallel.hashing import hashed_on_host

GENERATED = {"copy": False, "reverse": True}  # whether the prompt comes once more in reverse
COUNTS = {"train": 2**17, "valid": 2**10, "test": 2**10}  # documents of each split


class Repeated:
    """Documents of a prompt of `length` symbols and of these symbols once more, from document `first` on.

    It reads like an array of tokens, of which only what is asked for is made.
    """

    def __init__(self, symbols: int, length: int, *, first: int, count: int, reverse: bool):
        self._symbols, self._length, self._first, self._count = symbols, length, first, count
        self._reverse = reverse

    def __len__(self) -> int:
        return self._count * 2 * self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        document, place = np.divmod(np.arange(*part.indices(len(self))), 2 * self._length)
        behind = place - self._length
        again = self._length - 1 - behind if self._reverse else behind
        position = np.where(behind < 0, place, again)
        return hashed_on_host(0, self._first + document, position) % np.uint32(self._symbols)


def repeated(config: DataConfig) -> dict[str, list[Stream]]:
    """The splits of a source of such documents, of `data.source_len` symbols out of `data.symbols`."""
    splits, first, reverse = {}, 0, GENERATED[config.source]
    for name, count in COUNTS.items():
        tokens = Repeated(config.symbols, config.source_len, first=first, count=count, reverse=reverse)
        ends = np.arange(1, count + 1, dtype=np.int64) * 2 * config.source_len
        splits[name] = [Stream(tokens, Packing(ends, ends - config.source_len), None)]
        first += count
    return splits
