"""Detection of a diverging run: outliers by robust statistics of the last steps.

All processes see the same losses and gradient norms, so all of them come to the same result.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm.config import DivergenceConfig

# Standard deviation of a normal distribution over its median absolute deviation (Rousseeuw and
# Croux, 1993, "Alternatives to the Median Absolute Deviation").
_MAD = 1.4826
# Least robust standard deviations, for runs whose values hardly change: a part of the median loss,
# and a difference of the logarithm of the gradient norm.
_LEAST_LOSS, _LEAST_LOG_NORM = 0.01, 0.1


class DivergenceMonitor:
    """Compares each step with the last steps that were no outliers.

    Attributes:
        first: number of the first outlier of those in a row; None if the last step was none.
        diverged: description of the divergence that was found; None without one.
        rollbacks, skipped: number of rollbacks of the run, and of batches that they skipped.
    """

    def __init__(self, config: DivergenceConfig):
        self.config = config
        self.set_phase(lambda step: 0)
        self.restore({})

    def set_phase(self, image_size_of: Callable[[int], int]) -> None:
        """Set how the next steps are compared: with steps of the same image size."""
        self._size_of = image_size_of

    def add(self, step: int, loss: float, grad_norm: float, finite: bool) -> None:
        """Take the values of a step, in the order of the steps."""
        if self.config.action == "off" or self.diverged is not None:
            return
        if self._size_of(step) != self._size:
            self.clear()
            self._size = self._size_of(step)
        full = len(self._losses) == self.config.window
        why = self._reason(loss, grad_norm, finite) if full else ""
        if not why:
            self.first, self._count = None, 0
            if finite:
                self._losses.append(loss)
                self._log_norms.append(_log(grad_norm))
            return
        self._count += 1
        if self.first is None:
            self.first = step
        if self._count >= self.config.in_a_row:
            steps = f"step {step}"
            if self.first != step:
                steps = f"steps {self.first} to {step}"
            self.diverged = f"the training diverges at {steps}: {why}"

    def clear(self) -> None:
        """Compare the next steps with none before them, as after a change of the phase."""
        counts = {"rollbacks": self.rollbacks, "skipped": self.skipped}
        self.restore({"size": self._size, **counts})

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: JSON values, equal in all processes."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "size": self._size,
            "first": self.first,
            "count": self._count,
            "diverged": self.diverged,
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; from an empty one as at the start of a run."""
        window = self.config.window
        self._losses = collections.deque[float](state.get("losses", ()), window)
        self._log_norms = collections.deque[float](state.get("log_norms", ()), window)
        self._size: int | None = state.get("size")
        self.first: int | None = state.get("first")
        self._count: int = state.get("count", 0)
        self.diverged: str | None = state.get("diverged")
        self.rollbacks = state.get("rollbacks", 0)
        self.skipped = state.get("skipped", 0)

    def _reason(self, loss: float, grad_norm: float, finite: bool) -> str:
        """Describe how a step is an outlier; an empty string if it is none."""
        if not finite:
            return "the loss or its gradient is not finite"
        times, before = self.config.threshold, f"of {self.config.window} steps before"
        median, deviation = _robust(self._losses)
        if loss > median + times * max(deviation, _LEAST_LOSS * abs(median)):
            return f"loss {loss:.4g}, median {median:.4g} {before}"
        log_median, deviation = _robust(self._log_norms)
        high = _log(grad_norm) > log_median + times * max(deviation, _LEAST_LOG_NORM)
        if high and loss > median:
            return f"gradient norm {grad_norm:.4g}, median {math.exp(log_median):.4g} {before}"
        return ""


def _robust(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the robust standard deviation."""
    median = float(np.median(values))
    return median, _MAD * float(np.median(np.abs(np.asarray(values) - median)))


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
