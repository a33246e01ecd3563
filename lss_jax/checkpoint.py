"""Checkpoints: global arrays in natural order, so that any mesh restores what any other saved."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run, `DIR/STEP/`, written in the background; a killed save leaves no half checkpoint.

    Each item (`params`, `opt_state`) is a tree of global arrays; the step is the folder's name.
    """

    def __init__(self, folder: Path, kept: int = 1):
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True, create=True),
        )

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
        """The named items of a step, each like its tree of `ShapeDtypeStruct`s, whose shardings say where to put it."""
        args = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in shapes}

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def like(shapes: Any, shardings: Any) -> Any:
    """Global shapes placed by shardings: what `restore` wants to know."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
