"""Evaluates the splits of a run, during training or from its newest checkpoint."""

import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lss_jax.config.schema import Config, ConfigError, from_dict
from lss_jax.data.loader import prefetched
from lss_jax.data.split import WindowSplit
from lss_jax.models import Model, Params, build_model
from lss_jax.runtime.distributed import is_first
from lss_jax.storage.checkpoint import restore_newest_sound
from lss_jax.storage.metrics import Record
from lss_jax.storage.workdir import saved_config
from lss_jax.tasks import Task, make_task
from lss_jax.tasks.task import means_of, values_of
from lss_jax.training.checkpointing import converted, natural_like, params_like
from lss_jax.training.compatibility import check_workdir
from lss_jax.training.imported import imported_params, with_fresh_adapters
from lss_jax.training.setup import mesh_of
from lss_jax.training.step import make_eval_step


def sums_on(
    eval_step: Callable[[Params, Any], Any], params: Params, split: WindowSplit, name: str, batches: int | None
) -> Iterator[Any]:
    """Yields the sums of `eval_step` over each of the first `batches` batches of a split, None for all of them.

    Read each before asking for the next: on CPU queued steps of simulated devices block one another.
    """
    count = split.batches if batches is None else min(batches, split.batches)
    made = prefetched(split.evaluation_batch, 0, count)
    for batch in tqdm(made, desc=name, total=count, unit="batch", leave=False, disable=None if is_first() else True):
        yield eval_step(params, batch)


def evaluate_split(
    task: Task,
    eval_step: Callable[[Params, Any], Any],
    params: Params,
    split: WindowSplit,
    *,
    name: str,
    batches: int | None,
) -> Record:
    """The task's metrics over the first `batches` batches of a split, None for all of them."""
    total: Any = None
    for sums in sums_on(eval_step, params, split, name, batches):
        sums = jax.tree.map(lambda each: np.asarray(each, np.float64), sums)
        total = sums if total is None else jax.tree.map(operator.add, total, sums)
    return values_of(task, means_of(total))


def restore_params(model: Model, mesh: Mesh, workdir: Path) -> tuple[int, Params]:
    """The step and the parameters of a run's newest sound checkpoint, sharded over this mesh; or what it starts from.

    Raises:
      ConfigError: the run has no checkpoint yet and was not imported, or none of them is sound.
    """
    stored = params_like(model, mesh)
    found = restore_newest_sound(workdir / "checkpoints", params=natural_like(stored, model.natural_shapes))
    if found is None:
        given = imported_params(model, mesh, workdir)
        if not given:
            raise ConfigError(f"{workdir} has no checkpoint yet; train there first")
        return 0, with_fresh_adapters(given, model, mesh)
    return found.step, converted(found.items["params"], stored)


def evaluate_run(
    workdir: Path | str,
    split: Literal["train", "valid", "test"] = "valid",
    batches: int | None = None,
    *,
    config: Config | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Record:
    """The metrics of a run's newest sound checkpoint on a split: `loss`, the task's other metrics, `step` and `split`.

    Args:
      workdir: the folder of a training run.
      split: the part of the run's data.
      batches: how many batches, from the first; None for all.
      config: the run's own by default; `load_config(workdir, {"mesh.seq": 4})` is that on another mesh, which gives
        the same loss.
      devices: the devices of the mesh; all there are by default.

    Raises:
      ConfigError: there is no run or no checkpoint, or the config does not fit it or the devices.
    """
    workdir, devices = Path(workdir), jax.devices() if devices is None else devices
    config = config or from_dict(saved_config(workdir))
    check_workdir(config, workdir, trains=False)
    mesh = mesh_of(config, devices, trains=False)
    task, model = make_task(config), build_model(config, mesh)
    data = task.splits(mesh)[split]
    step, params = restore_params(model, mesh, workdir)
    return {
        "step": step,
        "split": split,
        **evaluate_split(task, make_eval_step(model, mesh), params, data, name=split, batches=batches),
    }
