"""A trace of a few training steps, by `jax.profiler`: what the devices did and when, for XProf and Perfetto."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lss_jax.config.schema import ProfileConfig
from lss_jax.runtime.distributed import is_first

STEP = "train_step"  # the name of each step in the trace

log = logging.getLogger(__name__)


class Profile:
    """Traces the steps `start` to `start + steps - 1`, as far as they are run, into a new folder in `folder`.

    Process 0 alone traces, and only its own devices: traces of several processes on one machine would share a name.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self._steps = range(config.start, config.start + config.steps) if is_first() else range(0)
        self._folder, self._tracing = folder, False

    def borders(self, number: int) -> bool:
        """Whether step `number` must finish before the next is queued: a trace starts after it, or stops with it."""
        return number + 1 in (self._steps.start, self._steps.stop)

    def before(self, number: int) -> None:
        """Starts the trace if step `number` belongs to it."""
        if number in self._steps and not self._tracing:
            self._start()

    def after(self, number: int) -> None:
        """Stops the trace if step `number` is its last."""
        if number + 1 not in self._steps:
            self.stop()

    def stop(self) -> None:
        """Stops a trace that has started, and writes it."""
        if self._tracing:
            self._tracing = False
            with self._warning_if_not("written"):
                jax.profiler.stop_trace()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would record every call of a Python function, none of them in a step
        with self._warning_if_not("started"):
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True

    @contextmanager
    def _warning_if_not(self, what: str) -> Iterator[None]:
        """Turns an error of the profiler into a warning: it does not end the run."""
        try:
            yield
        except Exception as error:  # about files or other profilers, of several types
            self._steps = range(0)
            log.warning("the profile in %s cannot be %s: %s", self._folder, what, " ".join(str(error).split())[:200])
