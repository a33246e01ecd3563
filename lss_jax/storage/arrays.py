"""The arrays of a checkpoint on the host, a slice at a time: without devices, and never a whole one in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from lss_jax.config.schema import ConfigError
from lss_jax.storage.checkpoint import manifest_of
from lss_jax.storage.checksums import Checksum


class StoredArrays:
    """The arrays of one item of a checkpoint, as Orbax has written them.

    Raises:
      ConfigError: the checkpoint's manifest is damaged.
    """

    def __init__(self, folder: Path, item: str):
        self._folder, self._item = folder, item
        self._checksums = manifest_of(folder)["checksums"]

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """The slices of an array along its first axis; at the end the whole is checked against its checksum.

        Raises:
          ConfigError: the array cannot be read, or is not what was saved.
        """
        array = self._open(name)
        yield from self._checked(name, (self._read(array[number], name) for number in range(array.shape[0])))

    def whole(self, name: str) -> np.ndarray:
        """An array, checked as above."""
        (found,) = self._checked(name, [self._read(self._open(name), name)])
        return found

    def _open(self, name: str) -> Any:
        folder = (self._folder / self._item).absolute()
        place = {"driver": "ocdbt", "base": folder.as_uri(), "path": name.replace("/", ".") + "/"}
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
        except Exception as error:  # what tensorstore raises depends on what is broken
            raise self._damaged(name, error) from error

    def _read(self, array: Any, name: str) -> np.ndarray:
        try:
            return array.read().result()
        except Exception as error:  # as above
            raise self._damaged(name, error) from error

    def _checked(self, name: str, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        checksum = Checksum()
        for piece in pieces:
            checksum.add(piece)
            yield piece
        if str(checksum) != self._checksums[f"{self._item}/{name}"]:
            raise self._damaged(name, "its checksum is another")

    def _damaged(self, name: str, why: object) -> ConfigError:
        reason = " ".join(str(why).split())[:200]
        return ConfigError(
            f"{self._folder}: {self._item}/{name} is not what was saved ({reason}); put the checkpoint back from a "
            f"copy, or remove it if there is an older one"
        )
