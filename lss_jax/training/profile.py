"""A trace of a few training steps, by `jax.profiler`: what the devices did and when, for XProf and Perfetto."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from lss_jax.config.schema import ProfileConfig
from lss_jax.runtime.distributed import is_first

STEP = "train_step"  # how each step is called in the trace

log = logging.getLogger(__name__)


class Profile:
    """Traces those of the steps `start` to `start + steps - 1` that are run, into a folder of its own in `folder`.

    Process 0 alone traces, its own devices: traces of several processes on one machine would have one name.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self._steps = range(config.start, config.start + config.steps) if is_first() else range(0)
        self._folder, self._tracing = folder, False

    def borders(self, number: int) -> bool:
        """Whether step `number` must be done before anything else: a trace begins after it, or ends with it."""
        return number + 1 in (self._steps.start, self._steps.stop)

    def before(self, number: int) -> None:
        """Begins the trace if step `number` belongs to it."""
        if number in self._steps and not self._tracing:
            self._start()

    def after(self, number: int) -> None:
        """Ends the trace if step `number` is the last of it."""
        if number + 1 not in self._steps:
            self.stop()

    def stop(self) -> None:
        """Writes what has been traced so far; does nothing if nothing has."""
        if self._tracing:
            self._tracing = False
            with self._telling("written"):
                jax.profiler.stop_trace()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of every Python function: nothing of a step
        with self._telling("started"):
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """A run does not end for want of its profile."""
        try:
            yield
        except Exception as error:  # of files, of other profilers: XLA raises it in several ways
            self._steps = range(0)
            log.warning("the profile in %s cannot be %s: %s", self._folder, what, " ".join(str(error).split())[:200])
