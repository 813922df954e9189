"""Detection of a diverging run: outliers by robust statistics of the last steps.

Losses and gradient norms are replicated outputs of one program, so all processes find the same
outliers, without communication. JAX does not guarantee this for hosts with different CPUs, whose
rounding may differ: neither do the parameters of such a run stay equal on its hosts.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm.config import DivergenceConfig

# Standard deviation of a normal distribution over its median absolute deviation (Rousseeuw and
# Croux, 1993, "Alternatives to the Median Absolute Deviation").
_MAD = 1.4826
# Least robust standard deviations, for runs whose values hardly change: a part of the median loss,
# and a difference of the logarithm of the gradient norm.
_LEAST_LOSS, _LEAST_LOG_NORM = 0.01, 0.1

Values = collections.deque[float]


class DivergenceMonitor:
    """Compares each step with the last steps of the same input size that were no outliers.

    Args:
        settings: everything else that the loss depends on, as text. Steps of a state with other
            settings are not compared.

    Attributes:
        first: number of the first outlier of those in a row; None if the last step was none.
        diverged: description of the divergence that was found; None without one.
        rollbacks, skipped: number of rollbacks of the run, and of batches that they skipped.
    """

    def __init__(self, config: DivergenceConfig, settings: str = ""):
        self.config, self._settings = config, settings
        self.restore({})

    def add(
        self, step: int, loss: float, grad_norm: float, finite: bool, input_size: str = ""
    ) -> None:
        """Take the values of a step, in the order of the steps.

        `input_size` is its image size and batch size, on which the loss depends.
        """
        if self.config.action == "off" or self.diverged is not None:
            return
        losses, log_norms = self._window(input_size)
        full = len(losses) == self.config.window
        why = self._reason(losses, log_norms, loss, grad_norm, finite) if full else ""
        if not why:
            self.first, self._count = None, 0
            if finite:
                losses.append(loss)
                log_norms.append(_log(grad_norm))
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
        self._windows: dict[str, tuple[Values, Values]] = {}
        self.first: int | None = None
        self._count: int = 0
        self.diverged: str | None = None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: JSON values, equal in all processes."""
        return {
            "settings": self._settings,
            "windows": {k: [list(v) for v in values] for k, values in self._windows.items()},
            "first": self.first,
            "count": self._count,
            "diverged": self.diverged,
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; from an empty one as at the start of a run.

        Of a state with other settings only the numbers of rollbacks and skipped batches remain. A
        divergence remains if it is to be rolled back.
        """
        self.clear()
        self.rollbacks = state.get("rollbacks", 0)
        self.skipped = state.get("skipped", 0)
        if state.get("settings") != self._settings:
            return
        for input_size, saved in state["windows"].items():
            for values, old in zip(self._window(input_size), saved, strict=True):
                values.extend(old)
        if self.config.action == "roll_back":
            self.first, self._count = state["first"], state["count"]
            self.diverged = state["diverged"]

    def _window(self, input_size: str) -> tuple[Values, Values]:
        """Losses and logarithms of the gradient norms of the last steps of an input size."""
        window = self.config.window
        new = collections.deque[float](maxlen=window), collections.deque[float](maxlen=window)
        return self._windows.setdefault(input_size, new)

    def _reason(
        self, losses: Values, log_norms: Values, loss: float, grad_norm: float, finite: bool
    ) -> str:
        """Describe how a step is an outlier; an empty string if it is none."""
        if not finite:
            return "the loss or its gradient is not finite"
        times, before = self.config.threshold, f"of {self.config.window} steps before"
        median, deviation = _robust(losses)
        if loss > median + times * max(deviation, _LEAST_LOSS * abs(median)):
            return f"loss {loss:.4g}, median {median:.4g} {before}"
        log_median, deviation = _robust(log_norms)
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
