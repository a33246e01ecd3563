"""A run's first parameters from a Hugging Face folder: each process reads what its own devices hold."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from lss_jax.config.schema import Config, ConfigError
from lss_jax.huggingface.families import FAMILIES, Family, Theirs
from lss_jax.huggingface.folder import CONFIG, FLOATS, Folder
from lss_jax.huggingface.keys import family_of
from lss_jax.huggingface.tensors import LAYERS, Shape, ours, stored_as
from lss_jax.models import Model


class Import:
    """The parameters of a folder under our names; of the folder only headers have been read.

    Raises:
      ConfigError: the folder is damaged, or its tensors are not those of the model; one line per problem.
    """

    def __init__(self, path: Path, model: Model):
        self.folder = Folder(path)
        self.family = FAMILIES[family_of(self.folder.config, path / CONFIG)]
        self._shapes = shapes_by_name(model)
        problems = _problems(self.folder, self.family, self._shapes, model.config)
        if problems:
            raise ConfigError("\n".join(problems))

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """One of our parameters, a layer at a time."""
        count, *rest = self._shapes[name]
        for layer in range(count):
            yield self.read(name, (slice(layer, layer + 1), *[slice(None)] * len(rest)))[0]

    def whole(self, name: str) -> np.ndarray:
        """One of our parameters."""
        return self.read(name, (slice(None),) * len(self._shapes[name]))

    def has(self, name: str) -> bool:
        """Whether one of our parameters is in the folder."""
        return name in self.family.tensors

    def array(self, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        """One of our parameters, global, sharded like `like`."""
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: self.read(name, index or ()))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one of our parameters, in float32, as all parameters are."""
        shape, theirs = self._shapes[name], self.family.tensors[name]
        part = tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True))
        found = np.empty([cut.stop - cut.start for cut in part], np.float32)
        if LAYERS not in theirs.name:
            found[...] = self._part(theirs.name, theirs, shape, part)
            return found
        for at, layer in enumerate(range(part[0].start, part[0].stop)):
            found[at] = self._part(theirs.name.format(layer), theirs, shape[1:], part[1:])
        return found

    def _part(self, tensor: str, theirs: Theirs, shape: Shape, part: tuple[slice, ...]) -> np.ndarray:
        return ours(partial(self.folder.read, _located(self.folder, tensor)), theirs, shape, part)


def shapes_by_name(model: Model) -> dict[str, tuple[int, ...]]:
    """The natural shapes of the model's parameters, by names such as `stack/blocks/mlp/up/kernel`."""
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(model.natural_shapes, sep="/").items()}


def _located(folder: Folder, name: str) -> str:
    """A tensor's name in the folder: files of a model without its head leave out the first part."""
    without_prefix = name.partition(".")[2]
    return without_prefix if name not in folder.tensors and without_prefix in folder.tensors else name


def _problems(folder: Folder, family: Family, shapes: dict[str, tuple[int, ...]], config: Config) -> list[str]:
    """What is missing, misshapen or left over."""
    problems, used = [], set()
    for name, shape in shapes.items():
        if name not in family.tensors:
            continue  # an adapter, which starts afresh
        tensors, expected = stored_as(family.tensors[name], shape)
        for tensor in (_located(folder, tensor) for tensor in tensors):
            used.add(tensor)
            if tensor not in folder.tensors:
                problems.append(f"{folder.path} has no tensor {tensor!r}, which is {name} here; fetch the folder again")
                continue
            found = folder.tensors[tensor]
            if found.shape != expected:
                problems.append(
                    f"{tensor!r} in {found.file} has shape {list(found.shape)}, and as {name} it needs "
                    f"{list(expected)} by {CONFIG}; give a folder whose files belong together"
                )
            elif found.dtype not in FLOATS:
                problems.append(
                    f"{tensor!r} in {found.file} is {found.dtype}, and as {name} it must be one of "
                    f"{', '.join(FLOATS)}; save the model again without quantization"
                )
    tied = {_located(folder, family.tensors["head/kernel_EV"].name)} if config.model.tied_head else set()
    for tensor in sorted(folder.tensors.keys() - used - tied):
        if not tensor.endswith(family.ignored):
            problems.append(
                f"{tensor!r} in {folder.tensors[tensor].file} is no parameter of {family.architecture} as it is built "
                f"here; {CONFIG} and tensors must belong together"
            )
    return problems
