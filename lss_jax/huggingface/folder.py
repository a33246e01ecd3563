"""A Hugging Face folder at rest: `config.json`, and tensors in one or many safetensors files."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from lss_jax.config.schema import ConfigError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "spiece.model")  # which are not read here
BESIDE = (  # what goes with a tokenizer
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt"),
    *OTHER_TOKENIZERS,
)
FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """Where a tensor is stored, and as what."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: `BF16`


class Folder:
    """The folder's config and the places of its tensors; of these only headers are read.

    Raises:
      ConfigError: a file is missing, truncated or not what it should be.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = read_config(path)
        self.tensors: dict[str, Stored] = {}
        for file, names in self._files().items():
            with _opened(file) as tensors:
                found = set(tensors.keys())
                for name in found if names is None else names:
                    if name not in found:
                        raise ConfigError(
                            f"{path / INDEX} says that {name!r} is in {file.name}, which does not have it; "
                            f"fetch both files again"
                        )
                    piece = tensors.get_slice(name)
                    self.tensors[name] = Stored(file, tuple(piece.get_shape()), piece.get_dtype())

    @property
    def tensor_files(self) -> list[Path]:
        """The files with tensors."""
        return sorted({stored.file for stored in self.tensors.values()})

    @property
    def other_files(self) -> list[Path]:
        """The other files that go with the model."""
        places = [self.path / name for name in (CONFIG, INDEX, TOKENIZER, GENERATION, *BESIDE)]
        return [file for file in places if file.is_file()]

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor in its own dtype, and nothing else of the file."""
        with _opened(self.tensors[name].file) as tensors:
            return tensors.get_slice(name)[part]

    def _files(self) -> dict[Path, list[str] | None]:
        """The files, each with the names of its tensors, None if that is not said."""
        if (self.path / INDEX).is_file():
            places = read_json(self.path / INDEX)
            weight_map = places.get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ConfigError(f'{self.path / INDEX} has no "weight_map" of files; fetch the file again')
            files: dict[Path, list[str] | None] = {}
            for name, file in weight_map.items():
                names = files.setdefault(self.path / file, [])
                assert names is not None
                names.append(name)
            return files
        if (self.path / SINGLE).is_file():
            return {self.path / SINGLE: None}
        pickled = next(iter(sorted(self.path.glob("*.bin"))), None)
        remedy = (
            f"{pickled.name} is a pickle, which is not read here: save the model again as safetensors"
            if pickled
            else "give a folder as `save_pretrained` of transformers writes it"
        )
        raise ConfigError(f"{self.path} has neither {SINGLE} nor {INDEX}; {remedy}")


def read_config(path: Path) -> dict[str, Any]:
    """The folder's `config.json`; raises a ConfigError if there is none."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give one with {CONFIG} and *.safetensors")
    return read_json(path / CONFIG)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file with an object in it; raises a ConfigError that names the file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); put it there or make it readable") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}, not an object; fetch the file again")
    return found


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; raises a ConfigError for one that is missing, truncated or no such file."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing; fetch it, it holds a part of the model")
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not a safetensors file ({error}); fetch it again"
        ) from error
    with opened as tensors:
        yield tensors
