"""The steps whose update was skipped because their loss or gradient is not finite."""

import math
from typing import NamedTuple

import jax


class Skipped(NamedTuple):
    """A step whose update was skipped, and the counts up to it."""

    step: int
    loss: float
    grad_norm: float
    in_a_row: int
    total: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4g} and gradient norm {self.grad_norm:.4g} at step {self.step}"


class Skips:
    """Counts skipped steps. Metrics stay on their devices until `settle`, so that steps can be queued.

    `total` and `in_a_row` are the counts so far, of a run that resumes.
    """

    def __init__(self, total: int, in_a_row: int):
        self.total, self.in_a_row = total, in_a_row
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step that has started."""
        self._pending.append((step, metrics))

    def settle(self) -> list[Skipped]:
        """Waits for all steps so far and returns those among them that were skipped."""
        found = []
        for step, metrics in self._pending:
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            if math.isfinite(loss) and math.isfinite(norm):
                self.in_a_row = 0
                continue
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            found.append(Skipped(step, loss, norm, self.in_a_row, self.total))
        self._pending.clear()
        return found
