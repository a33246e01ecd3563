"""A run: mesh, model, data, compiled steps, state and files, all from one config."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lss_jax.attention.setting import kernel_on, layout_on
from lss_jax.checkpoint import Checkpoints, like
from lss_jax.config import Config, ConfigError, changes, check_same_model, from_dict, validate
from lss_jax.data.loader import (
    Batch,
    batch_like,
    consecutive_starts,
    document_edges,
    prefetched,
    read_batch,
    shuffled_starts,
    training_windows,
)
from lss_jax.data.sources import open_splits
from lss_jax.losses import LossSum
from lss_jax.mesh import make_mesh, shardings
from lss_jax.metrics import MetricsWriter, Record, bits_per_byte
from lss_jax.models import Model, Params, build_model
from lss_jax.optimizer import make_optimizer, make_schedule
from lss_jax.state import TrainState, init_state, kept_specs, state_shardings
from lss_jax.step import make_eval_step, make_train_step


class Trainer:
    """Trains a model in `workdir`, and goes on where the last run there stopped.

    Building one validates everything, opens the data, makes or restores the state, and only then writes.

    Raises:
      ConfigError: the config, the data or the workdir cannot work; nothing has been written.
    """

    def __init__(self, config: Config, workdir: Path, devices: Sequence[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        self.config, self.workdir = config, workdir
        self.mesh = make_mesh(validate(config, len(devices)), devices)
        self.kernel = kernel_on(config, self.mesh)
        self.model = build_model(config)
        self.stopping = False  # set it (from a signal handler, say), and `fit` ends after the step in hand
        self._blocks = self.mesh.devices.flat[0].platform == "cpu"
        self._optimizer = make_optimizer(config.optim)
        self._schedule = make_schedule(config.optim)
        self._train_step: Callable | None = None
        self._eval_step = make_eval_step(self.model, self.mesh)
        saved = Checkpoints(workdir / "checkpoints")
        self.step = saved.latest_step() or 0
        self.changes = check_workdir(config, workdir) if self.step else {}
        check_writable(workdir)
        self.splits = {name: Split(data, config, self.mesh) for name, data in open_splits(config.data).items()}
        self.state = self._restored(saved) if self.step else self._fresh()
        saved.close()
        self._checkpoints = open_workdir(config, workdir)
        self._metrics = MetricsWriter(workdir, self.step)

    def compile(self) -> float:
        """Compiles the training step, unless that is done already; returns the seconds that it took."""
        started = time.perf_counter()
        if self._train_step is None:
            data, layout = self.config.data, layout_on(self.config, self.mesh)
            batch = batch_like(data.batch_size, data.seq_len, self.mesh, layout, packed=bool(data.separator))
            step = make_train_step(self.model, self._optimizer, self.mesh)
            self._train_step = step.lower(self.state, batch).compile()
        return time.perf_counter() - started

    def fit(self) -> Iterator[Record]:
        """Trains up to `optim.steps`; yields a record each time that there is one, after writing it.

        It can be left at any record and called again. On CPU every step is waited for: queued steps of simulated
        devices block one another in XLA's thread pool.
        """
        self.compile()
        assert self._train_step is not None
        config, first = self.config, self.step
        steps_timed, seconds = 0, 0.0
        batches = prefetched(self.training_batch, first, config.optim.steps)
        for step in range(first + 1, config.optim.steps + 1):
            started = time.perf_counter()
            self.state, metrics = self._train_step(self.state, next(batches))
            self.step = step
            last = step == config.optim.steps
            logs = step % config.log_every == 0 or last
            if logs or self._blocks:
                jax.block_until_ready(self.state)
            steps_timed, seconds = steps_timed + 1, seconds + time.perf_counter() - started
            records = []
            if logs:
                records.append(self._train_record(metrics, seconds / steps_timed))
                steps_timed, seconds = 0, 0.0
            if last or (config.eval_every and step % config.eval_every == 0):
                records.append(self.evaluate("valid", config.eval_batches))
            for record in records:
                self._metrics.write(record)
            if last or step % config.checkpoint_every == 0:
                self.save()
            yield from records  # with everything done, so that nothing is lost if nobody comes back
            if self.stopping:
                break
        batches.close()

    def evaluate(self, split: str, batches: int | None = None) -> Record:
        """Loss over the first `batches` batches of a split, None for all of it."""
        losses = evaluate_split(self._eval_step, self.state.params, self.splits[split], split, batches)
        return {"step": self.step, "split": split, **losses}

    def training_batch(self, step: int) -> Batch:
        """The global batch of a step (counted from 0), which depends on the seed and the step alone."""
        data, train = self.config.data, self.splits["train"]
        windows = training_windows(len(train.data), data.seq_len)
        order = {"batch_size": data.batch_size, "seq_len": data.seq_len, "seed": self.config.seed}
        return train.read(shuffled_starts(step, windows=windows, **order))

    def save(self) -> None:
        """Starts saving the state as it is now; `close` waits for it."""
        self._checkpoints.save(self.step, params=self.state.params, opt_state=self.state.opt_state)

    def close(self) -> None:
        """Waits for what is still being written."""
        self._checkpoints.close()
        self._metrics.close()

    def _fresh(self) -> TrainState:
        return init_state(self.model, self._optimizer, self.mesh, self.config.seed)

    def _restored(self, saved: Checkpoints) -> TrainState:
        placed = state_shardings(self.model, self._optimizer, self.mesh)
        items = saved.restore(
            self.step,
            params=like(self.model.shapes, placed.params),
            opt_state=like(jax.eval_shape(self._optimizer.init, self.model.shapes), placed.opt_state),
        )
        return TrainState(jax.device_put(np.int32(self.step), placed.step), **items)

    def _train_record(self, metrics: dict[str, jax.Array], step_seconds: float) -> Record:
        tokens = self.config.data.batch_size * self.config.data.seq_len
        return {
            "step": self.step,
            "split": "train",
            "loss": float(metrics["loss"]),
            "bits_per_byte": bits_per_byte(float(metrics["loss"])),
            "learning_rate": float(self._schedule(self.step - 1)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": tokens / step_seconds,
            "step_seconds": step_seconds,
        }


class Split:
    """A split of the data, to be read in batches for a mesh; finds the documents in it if they count."""

    def __init__(self, data: np.ndarray, config: Config, mesh: Mesh):
        self.data, self.batch_size, self.seq_len = data, config.data.batch_size, config.data.seq_len
        self._documents = document_edges(data, config.data.separator)
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


def evaluate_split(
    eval_step: Callable[[Params, Batch], LossSum], params: Params, split: Split, name: str, batches: int | None
) -> Record:
    """Nats and bits per counted byte over the first `batches` batches of a split, None for all of it."""
    starts = consecutive_starts(len(split.data), batch_size=split.batch_size, seq_len=split.seq_len)[:batches]
    nats, count = 0.0, 0.0
    made = prefetched(lambda index: split.read(starts[index]), 0, len(starts))
    for batch in tqdm(made, desc=name, total=len(starts), unit="batch", leave=False, disable=None):
        sums = eval_step(params, batch)
        nats, count = nats + float(sums.nats), count + float(sums.tokens)
    loss = nats / max(count, 1.0)
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss)}


def restore_params(model: Model, mesh: Mesh, workdir: Path) -> tuple[int, Params]:
    """The newest saved step of a run, and its parameters, placed on this mesh.

    Raises:
      ConfigError: the run has no checkpoint yet.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step()
    if step is None:
        raise ConfigError(f"{workdir} has no checkpoint yet; train there first")
    params = checkpoints.restore(step, params=like(model.shapes, shardings(kept_specs(model, mesh), mesh)))["params"]
    checkpoints.close()
    return step, params


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


def open_workdir(config: Config, workdir: Path) -> Checkpoints:
    """Makes the folder where needed and keeps the config beside the checkpoints."""
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = workdir / "config.json.unfinished"
    unfinished.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    os.replace(unfinished, workdir / "config.json")
    return Checkpoints(workdir / "checkpoints", config.checkpoints_kept)


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
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); restore it or choose another --workdir") from error
    except (ConfigError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is not a config of this program ({reason}); choose another --workdir") from error
