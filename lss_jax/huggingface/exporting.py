"""A run as a Hugging Face folder: tensors stream from the checkpoint, a layer at a time; processes share the files."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from lss_jax.huggingface.families import Theirs
from lss_jax.huggingface.folder import INDEX, SINGLE
from lss_jax.huggingface.tensors import LAYERS, Shape, stored_as, their_part
from lss_jax.models.layers import ADAPTER, merged
from lss_jax.storage.tensor_files import header_of

DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LARGEST_FILE = 4 * 2**30  # bytes, unless one of our parameters alone takes more


class Source(Protocol):
    """Parameters under our names, whole or a layer at a time."""

    def layers(self, name: str) -> Iterator[np.ndarray]: ...

    def whole(self, name: str) -> np.ndarray: ...


class Merged:
    """A source with each adapter merged into its kernel."""

    def __init__(self, source: Source, names: Collection[str], scale: float):
        self._source, self._names, self._scale = source, names, scale

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """One of our parameters, a layer at a time."""
        a, b = (f"{name.rpartition('/')[0]}/{factor}" for factor in ADAPTER)
        if not name.endswith("/kernel") or a not in self._names:
            return self._source.layers(name)
        kernels, a_layers, b_layers = map(self._source.layers, (name, a, b))
        return (merged(*layer, self._scale) for layer in zip(kernels, a_layers, b_layers, strict=True))

    def whole(self, name: str) -> np.ndarray:
        """One of our parameters that is not stacked, and so has no adapter."""
        return self._source.whole(name)


class Group(NamedTuple):
    """Our parameters that are parts of the same tensors: one, or queries, keys and values."""

    names: tuple[str, ...]  # ours
    theirs: Theirs
    tensors: tuple[str, ...]  # theirs, of all layers
    shape: Shape  # of each of these


def groups_of(tensors: Mapping[str, Theirs], shapes: Mapping[str, Shape]) -> list[Group]:
    """All tensors to be written, from the shapes of our parameters by name."""
    names: dict[str, list[str]] = {}
    for name in shapes:
        if name in tensors:
            names.setdefault(tensors[name].name, []).append(name)
    groups = []
    for ours in names.values():
        ours.sort(key=lambda name: tensors[name].third or 0)
        theirs = tensors[ours[0]]
        stored, shape = stored_as(theirs, shapes[ours[0]])
        groups.append(Group(tuple(ours), theirs, tuple(stored), shape))
    return groups


def files_of(groups: list[Group], itemsize: int) -> dict[str, list[Group]]:
    """The files' names, each with the groups that it holds."""
    files: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        more = len(group.tensors) * math.prod(group.shape) * itemsize
        if files[-1] and size + more > LARGEST_FILE:
            files, size = [*files, []], 0
        files[-1].append(group)
        size += more
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": held for n, held in enumerate(files, start=1)}


def write_file(path: Path, groups: list[Group], source: Source, dtype: np.dtype) -> None:
    """Writes one safetensors file, tensor after tensor: only one layer is in memory."""
    header = header_of({tensor: (dtype, g.shape) for g in groups for tensor in g.tensors}, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for group in groups:
            for array in _tensors(group, source):
                assert array.shape == group.shape
                file.write(np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(-1).view(np.uint8).data)


def write_index(path: Path, files: Mapping[str, list[Group]], itemsize: int) -> None:
    """Writes the index that says which tensor is in which file, if there are several."""
    if len(files) == 1:
        return
    places = {tensor: name for name, held in files.items() for group in held for tensor in group.tensors}
    total = sum(len(g.tensors) * math.prod(g.shape) * itemsize for held in files.values() for g in held)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(group: Group, source: Source) -> Iterator[np.ndarray]:
    """The tensors of a group, layer by layer."""
    if LAYERS not in group.theirs.name:
        yield their_part(group.theirs, source.whole(group.names[0]))
        return
    for parts in zip(*(source.layers(name) for name in group.names), strict=True):
        yield np.concatenate([their_part(group.theirs, part) for part in parts], axis=-1)
