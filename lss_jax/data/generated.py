"""Sources without a file: documents of random symbols, each a prompt and its copy, or the prompt reversed.

They are what an encoder-decoder learns first, at any length, and are the same on every machine: a symbol is a hash of
the number of its document and of its position in the prompt.
"""

import numpy as np

from lss_jax.config.schema import DataConfig
from lss_jax.data.packing import Packing, Stream
from lss_jax.data.sources import Part
from lss_jax.parallel.hashing import hashed_on_host

GENERATED = {"copy": False, "reverse": True}  # whether the prompt comes once more in reverse
COUNTS = {"train": 2**17, "valid": 2**10, "test": 2**10}  # documents of each split


class Repeated:
    """A source of documents: a prompt of `length` symbols, and these symbols once more, in order or reversed.

    Only what is read is made.
    """

    def __init__(self, symbols: int, length: int, *, reverse: bool):
        self._symbols, self._length, self._reverse = symbols, length, reverse
        self.size = self.text_bytes = sum(COUNTS.values()) * 2 * length

    def read(self, start: int, stop: int) -> np.ndarray:
        document, place = np.divmod(np.arange(start, stop), 2 * self._length)
        behind = place - self._length
        again = self._length - 1 - behind if self._reverse else behind
        return hashed_on_host(0, document, np.where(behind < 0, place, again)) % np.uint32(self._symbols)

    def mapped(self) -> np.ndarray:
        """What makes the documents: by this a run knows them again."""
        return np.array([self._symbols, self._length, self._reverse], np.int64).view(np.uint8)

    def check(self) -> None:
        pass


def repeated(config: DataConfig) -> dict[str, list[Stream]]:
    """The splits of a source of such documents, of `data.source_len` symbols out of `data.symbols`."""
    source, length = Repeated(config.symbols, config.source_len, reverse=GENERATED[config.source]), config.source_len
    splits, first = {}, 0
    for name, count in COUNTS.items():
        part = Part(source, 2 * length * first, 2 * length * (first + count))
        ends = np.arange(1, count + 1, dtype=np.int64) * 2 * length
        splits[name] = [Stream(part, Packing(ends, ends - length), None)]
        first += count
    return splits
