"""A run: mesh, model, data, compiled steps, state and files, all from one config."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lss_jax.attention.placement import kernel_on
from lss_jax.config.schema import Config, ConfigError, RunError, gather_problems
from lss_jax.data.kinds import check_files
from lss_jax.data.loader import prefetched
from lss_jax.data.sources import fingerprint
from lss_jax.models import build_model
from lss_jax.runtime.distributed import after_first, is_first
from lss_jax.runtime.interrupt import held_back
from lss_jax.storage.checkpoint import CheckpointWriter, Restored, newest_step, restore_newest_sound
from lss_jax.storage.metrics import MetricsWriter, Record
from lss_jax.storage.workdir import IMPORTED, check_writable, keep_config
from lss_jax.tasks import make_task
from lss_jax.tasks.task import values_of
from lss_jax.training.checkpointing import converted, natural_like
from lss_jax.training.compatibility import check_workdir
from lss_jax.training.evaluation import evaluate_split
from lss_jax.training.host import check_hosts
from lss_jax.training.optimizer import make_optimizer, make_schedule
from lss_jax.training.profile import STEP, Profile
from lss_jax.training.setup import mesh_of, validate
from lss_jax.training.skips import Skips
from lss_jax.training.start import check_start, params_to_start_from
from lss_jax.training.state import TrainState, init_state, moments_like, state_like
from lss_jax.training.step import make_eval_step, trace_train_step

log = logging.getLogger(__name__)

PATHS = ("path", "valid_path", "test_path", "annotation")
OF_TEXT = ("separator", "field", "prompt_field", "answer_field")
OF_IMAGES = ("downsample", "grid")
NEW_DATA = {f"data.{key}" for key in ("source", *PATHS, *OF_TEXT, *OF_IMAGES)}


class Trainer:
    """Trains a model in `workdir`, resuming from the newest sound checkpoint there.

    The constructor validates everything, opens the data, makes or restores the state, and only then writes. With
    several processes each builds one, and all call the same methods in the same order. `state` is the training state
    (global arrays; `state.params`), `like` its shapes and shardings, `step` the number of finished steps; `mesh` and
    `config` are what it trains by.

    Args:
      config: from `lss_jax.load_config`.
      workdir: the folder for checkpoints, metrics and the config; created if needed.
      devices: the devices of the mesh; all there are by default.

    Raises:
      ConfigError: the config, the data or the workdir cannot work; nothing has been written.
    """

    def __init__(self, config: Config, workdir: Path | str, devices: Sequence[jax.Device] | None = None):
        devices, workdir = jax.devices() if devices is None else devices, Path(workdir)
        self.config, self.workdir, folder = config, workdir, workdir / "checkpoints"
        saved_steps = newest_step(folder) is not None
        gather_problems(
            lambda: validate(config, len(devices)),
            lambda: check_files(config.data),
            lambda: None if saved_steps else check_start(config, workdir),
            lambda: check_writable(workdir),
        )
        self.mesh = mesh_of(config, devices)
        self.kernel = kernel_on(config.attention, self.mesh)
        self.model, self.task = build_model(config, self.mesh), make_task(config)
        self._waits_for_steps = self.mesh.devices.flat[0].platform == "cpu"
        self._optimizer = make_optimizer(config.optim)
        self._schedule = make_schedule(config.optim)
        self.like = state_like(self.model, self._optimizer, self.mesh)
        check_hosts(self.model, self.mesh, self.like)
        moments = moments_like(self._optimizer, self.model, self.model.natural_shapes)
        self._natural = {
            "params": natural_like(self.like.params, self.model.natural_shapes),
            "opt_state": natural_like(self.like.opt_state, moments),
        }
        self._train_step: Callable | None = None
        self._eval_step = make_eval_step(self.model, self.mesh)
        starts = saved_steps or (workdir / IMPORTED).is_dir()
        self.changes = check_workdir(config, workdir, saved_steps=saved_steps) if starts else {}
        self.splits = self.task.splits(self.mesh)
        sources = (source for split in self.splits.values() for source in split.sources)
        self._sources = list(dict.fromkeys(sources))  # splits may be parts of one
        self._data = fingerprint(*self._sources)
        found = self._restored(folder)
        self.step = found.step if found else 0
        stored = {"params": self.like.params, "opt_state": self.like.opt_state}
        self.state = TrainState(self._step_number(), **converted(found.items, stored)) if found else self._fresh()
        self._skips = Skips(*found.notes["skips"]) if found else Skips(0, 0)
        self._profile = Profile(config.profile, workdir / "profile")
        after_first(lambda: keep_config(config, workdir))
        self._checkpoints = CheckpointWriter(folder, config.checkpoints_kept, self.step)
        with self._writing_metrics():
            self._metrics = MetricsWriter(workdir, self.step) if is_first() else None

    def compile(self) -> float:
        """Compiles the training step, unless it is compiled already; returns the seconds taken."""
        started = time.perf_counter()
        if self._train_step is None:
            self._train_step = trace_train_step(self.model, self.mesh).lower().compile()
        return time.perf_counter() - started

    def fit(self, may_start: Callable[[int], bool] = lambda step: True) -> Iterator[Record]:
        """Trains up to `optim.steps`; yields each metrics record after writing it.

        The caller may leave the loop at any record and call `fit` again. Training stops before a step (counted from 1)
        for which `may_start` is false. On CPU each step is waited for: queued steps of simulated devices block one
        another in XLA's thread pool.

        Raises:
          RunError: too many steps were not finite, a checkpoint cannot be written, or the data has changed.
          KeyboardInterrupt: Ctrl-C (a notebook's interrupt), after the running step and its records and checkpoint;
            `fit` can then be called again. A second Ctrl-C interrupts at once: if that loses the state, build another
            Trainer, which resumes from the last checkpoint.
        """
        self.compile()
        try:
            with closing(prefetched(self.training_batch, self.step, self.config.optim.steps)) as batches:
                yield from self._fit(batches, may_start)
        finally:
            self._profile.stop()  # if the run ends while a profile is being taken

    def _fit(self, batches: Iterator[Any], may_start: Callable[[int], bool]) -> Iterator[Record]:
        assert self._train_step is not None
        config, first = self.config, self.step
        steps_timed, seconds = 0, 0.0
        for step in range(first + 1, config.optim.steps + 1):
            if not may_start(step):
                jax.block_until_ready(self.state)
                break
            with held_back():
                self._profile.before(step)
                started = time.perf_counter()
                last = step == config.optim.steps
                logs = step % config.log_every == 0 or last
                with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
                    self.state, metrics = self._train_step(self.state, next(batches))
                    self._skips.add(step, metrics)
                    self.step = step
                    if logs or self._waits_for_steps or self._profile.borders(step):
                        jax.block_until_ready(self.state)
                        self._settle()
                steps_timed, seconds = steps_timed + 1, seconds + time.perf_counter() - started
                self._profile.after(step)
                records = []
                if logs:
                    self._checkpoints.check()
                    records.append(self._train_record(metrics, seconds / steps_timed))
                    steps_timed, seconds = 0, 0.0
                if last or (config.eval_every and step % config.eval_every == 0):
                    records.append(self.evaluate("valid", config.eval_batches))
                self._write(records)
                if last or step % config.checkpoint_every == 0:
                    self.save()
            yield from records  # after all else, so that nothing is lost if the caller leaves here

    def evaluate(self, split: str, batches: int | None = None) -> Record:
        """The metrics over the first `batches` batches of a split, None for all of them."""
        step = {"step": self.step, "split": split}
        params, data = self.state.params, self.splits[split]
        return step | evaluate_split(self.task, self._eval_step, params, data, name=split, batches=batches)

    def training_batch(self, step: int) -> Any:
        """The global batch of a step (counted from 0), which depends on the seed and the step alone."""
        return self.splits["train"].training_batch(step)

    def save(self) -> None:
        """Starts saving the state as it is now; `close` waits until it is saved.

        Raises:
          RunError: the state cannot be saved, or the data is not what the run started with.
        """
        self._settle()
        for source in self._sources:
            source.check()
        notes = {"skips": [self._skips.total, self._skips.in_a_row], "data": self._data}
        items = {"params": self.state.params, "opt_state": self.state.opt_state}
        self._checkpoints.save(self.step, notes, **converted(items, self._natural))

    def close(self) -> None:
        """Waits for the last checkpoint and closes the files."""
        self._checkpoints.close()
        if self._metrics:
            self._metrics.close()

    def _fresh(self) -> TrainState:
        given = params_to_start_from(self.config, self.workdir, self.model, self.mesh)
        return init_state(self.model, self._optimizer, self.mesh, self.config.seed, given)

    def _restored(self, folder: Path) -> Restored | None:
        found = restore_newest_sound(folder, **self._natural)
        if found and found.notes["data"] != self._data and not self.changes.keys() & NEW_DATA:
            data, then = self.config.data, found.notes["data"]
            raise ConfigError(
                f"data.source={data.source!r}, data.path={data.path!r}: {self._data['bytes']} bytes with fingerprint "
                f"{self._data['sha256'][:12]}, but the run in {self.workdir} was trained on {then['bytes']} bytes with "
                f"{then['sha256'][:12]}; put the file back, give new data under a new data.path, or choose another "
                f"--workdir"
            )
        return found

    def _step_number(self) -> jax.Array:
        return jax.make_array_from_callback((), self.like.step.sharding, lambda _: np.array(self.step, np.int32))

    def _settle(self) -> None:
        """Logs the steps skipped since the last call; raises a RunError after too many in a row."""
        for skipped in self._skips.settle():
            log.warning("%s: update skipped (%d in a row, %d in all)", skipped, skipped.in_a_row, skipped.total)
            if skipped.in_a_row >= self.config.optim.max_skipped:
                self._checkpoints.wait()
                raise RunError(
                    f"{skipped}: not finite for optim.max_skipped={self.config.optim.max_skipped} steps in a row, none "
                    f"of which reached the parameters; {self._checkpoints.newest()}; look at the data, or lower "
                    f"optim.learning_rate"
                )

    def _write(self, records: list[Record]) -> None:
        if self._metrics is not None:
            with self._writing_metrics():
                for record in records:
                    self._metrics.write(record)

    @contextmanager
    def _writing_metrics(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"the metrics cannot be written to {self.workdir} ({error.strerror}); {self._checkpoints.newest()}; "
                f"make room or make the folder writable, then the same command goes on from there"
            ) from error

    def _train_record(self, metrics: dict[str, jax.Array], step_seconds: float) -> Record:
        tokens = self.config.data.batch_size * self.config.data.seq_len
        return {
            "step": self.step,
            "split": "train",
            **values_of(self.task, metrics),
            "learning_rate": float(self._schedule(self.step - 1 - self._skips.total)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": tokens / step_seconds,
            "step_seconds": step_seconds,
            "skipped": self._skips.total,
        }
