"""The folder of a run: whether it can serve this config, and the config that is kept there."""

import dataclasses
import json
import os
from pathlib import Path

from lss_jax.config.schema import Config, ConfigError, changes, check_same_model, from_dict


def check_workdir(config: Config, workdir: Path) -> dict:
    """Refuses a workdir whose checkpoints cannot serve this config; returns what else differs, key to (then, now)."""
    saved = from_dict(saved_config(workdir))
    check_same_model(saved, config, workdir)
    return changes(saved, config)


def check_writable(workdir: Path) -> None:
    """Refuses a workdir that cannot be written to; writes nothing."""
    nearest = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"workdir {workdir}: {nearest} is not a folder that can be written to; choose another")


def keep_config(config: Config, workdir: Path) -> None:
    """Makes the folder where needed and writes the config into it, whole or not at all.

    Raises:
      ConfigError: that fails.
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


def saved_config(workdir: Path) -> dict:
    """The config of the run in `workdir`, as a nested dict.

    Raises:
      ConfigError: there is no run.
    """
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
        from_dict(values)
        return values
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the --workdir of a training run") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise ConfigError(_foreign(path, error)) from error
        raise ConfigError(f"{path} is not valid JSON ({error}); restore it or choose another --workdir") from error
    except AttributeError as error:
        raise ConfigError(_foreign(path, error)) from error


def _foreign(path: Path, error: Exception) -> str:
    return f"{path} is not a config of this program ({str(error).splitlines()[0]}); choose another --workdir"
