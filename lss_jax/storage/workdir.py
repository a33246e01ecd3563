"""The folder of a run: the config saved there, and files that are written whole or not at all."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lss_jax.config.loading import load_config_file, set_keys
from lss_jax.config.schema import Config, ConfigError, from_dict

IMPORTED = "imported"  # within the folder of a run: the Hugging Face folder that it starts from


def load_config(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a Python file such as `configs/default.py`, or of a run's folder, with some keys changed.

    >>> load_config("configs/default.py", {"mesh.seq": 4, "optim.steps": 1000}).optim.steps
    1000

    Args:
      path: a file with a function `get_config`, or the workdir of a run.
      overrides: new values by their dotted keys, which `configs/base.py` lists.

    Raises:
      ConfigError: no such file, folder or key, or a value of the wrong type or outside its choices; one line per
        problem. Rules that depend on the devices are checked where those are known.
    """
    file = Path(path)
    config = ConfigDict(saved_config(file)) if file.is_dir() else load_config_file(str(path))
    set_keys(config, overrides or {})
    return from_dict(config)


def saved_config(workdir: Path) -> dict:
    """The config of the run in `workdir`, as a nested dict.

    Raises:
      ConfigError: there is no run.
    """
    path = workdir / "config.json"
    try:
        values = dataclasses.asdict(from_dict(json.loads(path.read_text())))  # JSON knows no tuples
        return _with_own_tokenizer(values, workdir)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the --workdir of a training run") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise ConfigError(_foreign(path, error)) from error
        raise ConfigError(f"{path} is not valid JSON ({error}); restore it or choose another --workdir") from error
    except AttributeError as error:
        raise ConfigError(_foreign(path, error)) from error


def _with_own_tokenizer(values: dict, workdir: Path) -> dict:
    """A saved config whose tokenizer, if it came in with the run, is the one in its folder, wherever that is now."""
    named = Path(values["data"]["tokenizer"])
    own = workdir / IMPORTED / named.name
    if named.parent.name == IMPORTED and own.is_file():
        values["data"]["tokenizer"] = str(own)
    return values


def _foreign(path: Path, error: Exception) -> str:
    return f"{path} is not a config of this program ({str(error).splitlines()[0]}); choose another --workdir"


def check_writable(workdir: Path) -> None:
    """Refuses a workdir that cannot be written to; writes nothing."""
    nearest = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"workdir {workdir}: {nearest} is not a folder that can be written to; choose another")


def keep_config(config: Config, workdir: Path) -> None:
    """Creates the folder if needed and writes the config into it, whole or not at all.

    Raises:
      ConfigError: the folder or the file cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be written to ({error.strerror}); make room, or choose another"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all; raises OSError."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(unfinished, path)
