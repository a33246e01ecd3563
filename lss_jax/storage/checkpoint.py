"""Checkpoints: global arrays in natural order, with checksums, so that any mesh restores what any other saved.

`DIR/STEP/` holds what Orbax writes for each item (`params`, `opt_state`) and a manifest: our own checksum of every
array and the run's notes, under a seal. Orbax renames the whole folder into place when all of it is written, so a
killed save leaves nothing that looks like a checkpoint. Restored arrays are checked against their checksums.
"""

import json
import logging
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lss_jax.config.schema import ConfigError, RunError
from lss_jax.runtime.distributed import all_agree, from_first, is_first
from lss_jax.storage.checksums import checksums

LARGEST_CHUNK = 2**27  # bytes; what reads an array in parts, or on another mesh, holds little more than it needs
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax has not renamed into place
DAMAGED = "damaged-"  # before the names of folders that were set aside

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A sound checkpoint: its items, and the notes saved with them."""

    step: int
    items: dict[str, Any]
    notes: dict[str, Any]


class Damage(Exception):
    """Why a checkpoint cannot be trusted."""


def newest_step(folder: Path, below: int = 2**31 - 1) -> int | None:
    """The step of the newest finished checkpoint under `folder` before `below`, sound or not, as process 0 sees it."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isdigit() and int(name) < below]
    step = from_first(max(steps, default=-1))
    return None if step < 0 else step


def restore_newest_sound(folder: Path, **shapes: Any) -> Restored | None:
    """Restores the newest checkpoint that passes its checks, and warns of damaged ones; None if there is none at all.

    Each item is restored with the shapes, dtypes and shardings of its tree of `ShapeDtypeStruct`s.

    Raises:
      ConfigError: there are checkpoints, but none of them is sound.
    """
    damaged: dict[int, str] = {}
    step = newest_step(folder)
    while step is not None:
        found = _restored(folder, step, shapes, damaged)
        if found:
            if damaged:
                log.warning("damaged: %s; going on from step %d", _listed(folder, damaged), step)
            return found
        step = newest_step(folder, below=step)
    if damaged:
        raise ConfigError(
            f"no sound checkpoint is left: {_listed(folder, damaged)}; put one back from a copy, or choose another "
            f"--workdir"
        )
    return None


def _listed(folder: Path, damaged: dict[int, str]) -> str:
    return ", ".join(f"{folder / str(step)} ({reason})" for step, reason in damaged.items())


def _restored(folder: Path, step: int, shapes: dict[str, Any], damaged: dict[int, str]) -> Restored | None:
    """Restores the checkpoint of a step if every process finds it sound; if not, records the reason in `damaged`."""
    reason = "another process cannot read it"
    found: Restored | None = None
    try:
        found = _read(folder / str(step), step, shapes)
    except Exception as error:  # a broken file makes Orbax and the libraries below it raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    if all_agree(found is not None):
        assert found is not None
        wrong = _differing(found)
        if not wrong:
            return found
        reason = f"not what was saved: {wrong[0]}" + (f" and {len(wrong) - 1} more" if wrong[1:] else "")
    damaged[step] = reason
    return None


def newest_notes(folder: Path) -> dict[str, Any] | None:
    """The notes of the newest checkpoint under `folder` with an intact manifest; its arrays are not read."""
    step = newest_step(folder)
    while step is not None:
        with suppress(OSError, ValueError, KeyError, TypeError, Damage):
            return _manifest(folder / str(step), step)
        step = newest_step(folder, below=step)
    return None


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`, whose name is its step.

    Raises:
      ConfigError: it is damaged.
    """
    try:
        return _manifest(folder, int(folder.name))
    except (OSError, ValueError, KeyError, TypeError, Damage) as error:
        raise ConfigError(
            f"{folder} is damaged ({error}); put it back from a copy, or remove it if there is an older one"
        ) from error


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest" / "metadata").read_text())
    if manifest["seal"] != _seal(manifest) or manifest["step"] != step:
        raise Damage("manifest: not what was saved")
    return manifest


def _read(folder: Path, step: int, shapes: dict[str, Any]) -> Restored:
    """Reads a checkpoint, in each process its own shards; none waits for another, so that one may fail alone."""
    manifest = _manifest(folder, step)
    items = {
        name: ocp.StandardCheckpointHandler().restore((folder / name).absolute(), args=ocp.args.StandardRestore(tree))
        for name, tree in shapes.items()
    }
    return Restored(step, items, manifest)


def _differing(found: Restored) -> list[str]:
    """The names of arrays whose checksum is not the saved one."""
    saved, now = found.notes["checksums"], checksums(found.items)
    return [name for name in now if saved.get(name) != now[name]]


def _seal(manifest: dict[str, Any]) -> int:
    values = {key: value for key, value in manifest.items() if key != "seal"}
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


class CheckpointWriter:
    """Writes the checkpoints of one run in the background and keeps the newest `kept`.

    `resumed_step` is the step that the run resumes from: later checkpoints, which are damaged, are renamed.
    """

    def __init__(self, folder: Path, kept: int, resumed_step: int):
        self._folder = folder
        if is_first():
            _set_aside(folder, resumed_step)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept, cleanup_tmp_directories=True, lightweight_initialize=True
        )
        with self._failing_clearly():
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, notes: dict[str, Any], **items: Any) -> None:
        """Starts saving trees of global arrays; does nothing if the step is saved already.

        Raises:
          RunError: this save cannot be started, or the previous one has failed.
        """
        if step == self._manager.latest_step():
            return
        manifest = {"step": step, "checksums": checksums(items), **notes}
        manifest["seal"] = _seal(manifest)
        trees = {name: ocp.args.StandardSave(tree, _in_layers(tree)) for name, tree in items.items()}
        with self._failing_clearly():
            self._manager.save(step, args=ocp.args.Composite(manifest=ocp.args.JsonSave(manifest), **trees))

    def check(self) -> None:
        """Raises a RunError if a save in the background has failed.

        Orbax's own `check_for_errors` does not report it: its background thread has already consumed the error.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk; raises a RunError if it cannot be."""
        with self._failing_clearly():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits like `wait`, then closes Orbax's manager: nothing can be saved afterwards."""
        self.wait()
        self._manager.close()

    def newest(self) -> str:
        """A clause that names the newest finished checkpoint, for error messages."""
        steps = [int(entry.name) for entry in self._folder.iterdir() if entry.name.isdigit()]
        return (
            f"the last sound checkpoint is {self._folder / str(max(steps))}" if steps else "there is no checkpoint yet"
        )

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on what its libraries raise
            if is_first():
                _remove_unfinished(self._folder)
            raise RunError(
                f"a checkpoint cannot be written to {self._folder} ({' '.join(str(error).split())[:200]}); "
                f"{self.newest()}; make room or make the folder writable, then the same command goes on from there"
            ) from error


def _in_layers(tree: Any) -> Any:
    """How the arrays of a tree are stored: in chunks, of one layer where there are three axes and more (stacked)."""
    return jax.tree.map(
        lambda leaf: ocp.SaveArgs(chunk_byte_size=LARGEST_CHUNK, shard_axes=(0,) if leaf.ndim > 2 else ()), tree
    )


def _remove_unfinished(folder: Path) -> None:
    """Removes unfinished checkpoints, which fill up the disk, until none has reappeared for a second.

    Orbax ends a save at its first error, while threads that write the other items create their folders again. What
    cannot be removed within ten seconds is left to the next run.
    """
    started = removed = time.monotonic()
    while time.monotonic() < min(removed + 1.0, started + 10.0):
        for unfinished in folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
            removed = time.monotonic()
        time.sleep(0.05)


def _set_aside(folder: Path, resumed_step: int) -> None:
    """Renames checkpoints of later steps, so that those steps can be saved again and a person can inspect these."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.isdigit() and int(entry.name) > resumed_step:
            aside = entry.with_name(DAMAGED + entry.name)
            shutil.rmtree(aside, ignore_errors=True)
            entry.rename(aside)
