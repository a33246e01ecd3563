"""Losses of a split: of a run in training, or of a run at rest."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lss_jax.config.schema import Config, ConfigError, from_dict
from lss_jax.data.batch import Batch
from lss_jax.data.loader import (
    consecutive_starts,
    document_edges,
    prefetched,
    read_batch,
)
from lss_jax.data.sources import Part, open_splits
from lss_jax.models import Model, Params, build_model
from lss_jax.models.losses import LossSum
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import like, shardings
from lss_jax.runtime.distributed import is_first
from lss_jax.storage.checkpoint import restore_newest_sound
from lss_jax.storage.metrics import Record, bits_per_byte
from lss_jax.storage.workdir import check_workdir, saved_config
from lss_jax.training.setup import mesh_of
from lss_jax.training.state import kept_specs
from lss_jax.training.step import make_eval_step


class Split:
    """A split of the data, to be read in batches for a mesh; finds the documents in it if they count."""

    def __init__(self, data: Part, config: Config, mesh: Mesh):
        self.data, self.batch_size, self.seq_len = data, config.data.batch_size, config.data.seq_len
        self._documents = document_edges(data.mapped(), config.data.separator)
        if len(data) <= config.attention.prefix:
            raise ConfigError(
                f"attention.prefix={config.attention.prefix} leaves nothing to predict in a split of {len(data)} "
                f"bytes; use a shorter prefix or a longer file"
            )
        self._mesh, self._layout = mesh, layout_on(config, mesh)

    @property
    def documents(self) -> int:
        """How many there are."""
        return 1 if self._documents is None else len(self._documents) - 1

    def read(self, starts_B: np.ndarray) -> Batch:
        """The batch of the windows at `starts_B`."""
        return read_batch(self.data, starts_B, self.seq_len, self._mesh, self._layout, self._documents)


def losses_on(
    eval_step: Callable[[Params, Batch], LossSum], params: Params, split: Split, name: str, batches: int | None
) -> Iterator[LossSum]:
    """What `eval_step` makes of the first `batches` batches of a split, None for all of it; read each before the next.

    On CPU queued steps of simulated devices would block one another.
    """
    starts = consecutive_starts(len(split.data), batch_size=split.batch_size, seq_len=split.seq_len)[:batches]
    made = prefetched(lambda index: split.read(starts[index]), 0, len(starts))
    for batch in tqdm(
        made, desc=name, total=len(starts), unit="batch", leave=False, disable=None if is_first() else True
    ):
        yield eval_step(params, batch)


def evaluate_split(
    eval_step: Callable[[Params, Batch], LossSum], params: Params, split: Split, name: str, batches: int | None
) -> Record:
    """Nats and bits per counted byte over the first `batches` batches of a split, None for all of it."""
    nats, count = 0.0, 0.0
    for sums in losses_on(eval_step, params, split, name, batches):
        nats, count = nats + float(sums.nats), count + float(sums.tokens)
    loss = nats / max(count, 1.0)
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss)}


def restore_params(model: Model, mesh: Mesh, workdir: Path) -> tuple[int, Params]:
    """The newest sound step of a run, and its parameters, placed on this mesh.

    Raises:
      ConfigError: the run has no checkpoint yet, or no sound one any more.
    """
    placed = shardings(kept_specs(model, mesh), mesh)
    found = restore_newest_sound(workdir / "checkpoints", params=like(model.shapes, placed))
    if found is None:
        raise ConfigError(f"{workdir} has no checkpoint yet; train there first")
    return found.step, found.items["params"]


def evaluate_run(
    workdir: Path | str,
    split: Literal["train", "valid", "test"] = "valid",
    batches: int | None = None,
    *,
    config: Config | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Record:
    """The loss of a run's newest sound checkpoint: `loss` in nats and `bits_per_byte`, `step` and `split`.

    Args:
      workdir: of a training run.
      split: of its data.
      batches: only the first so many; None for all of them.
      config: the run's own, unless given; `load_config(workdir, {"mesh.seq": 4})` is that on another mesh, which gives
        the same loss.
      devices: what the mesh is made of; all there are, unless given.

    Raises:
      ConfigError: there is no run or no checkpoint, or the config does not fit it or the devices.
    """
    workdir, devices = Path(workdir), jax.devices() if devices is None else devices
    config = config or from_dict(saved_config(workdir))
    check_workdir(config, workdir)
    mesh = mesh_of(config, devices)
    data = Split(open_splits(config.data)[split], config, mesh)
    model = build_model(config)
    step, params = restore_params(model, mesh, workdir)
    losses = evaluate_split(make_eval_step(model, mesh), params, data, split, batches)
    return {"step": step, "split": split, **losses}
