"""Checkpoints: global arrays in natural order, so that any mesh restores what any other saved."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lss_jax.config import ConfigError


class Checkpoints:
    """The checkpoints of one run, `DIR/STEP/`, written in the background; a killed save leaves no half checkpoint.

    Each item (`params`, `opt_state`) is a tree of global arrays; the step is the folder's name.
    """

    def __init__(self, folder: Path, kept: int | None = None):
        """Opens `folder` for writing, with the newest `kept` checkpoints; with None for reading alone."""
        self._folder = folder
        writes = kept is not None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept, create=writes, cleanup_tmp_directories=writes, read_only=not writes
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest saved step, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, **items: Any) -> None:
        """Starts saving in the background; a step that is already saved is left alone."""
        if step != self.latest_step():
            self._manager.save(
                step, args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
            )

    def restore(self, step: int, **shapes: Any) -> dict[str, Any]:
        """The named items of a step, each like its tree of `ShapeDtypeStruct`s, whose shardings say where to put it.

        Raises:
          ConfigError: the checkpoint is damaged, or of another program.
        """
        args = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax raises whatever the broken file made its libraries raise
            raise ConfigError(
                f"checkpoint {self._folder / str(step)} cannot be restored "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); "
                f"delete that folder to go on from an older one, or choose another workdir"
            ) from error
        return {name: restored[name] for name in shapes}

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def like(shapes: Any, shardings: Any) -> Any:
    """Global shapes placed by shardings: what `restore` wants to know."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
