"""Time of a method, estimated after warm-up, and the steps that fit a budget; memory of a trial.

Every method measures its work with `measured` and asks `TimeBudget.plan` how many steps fit.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from vlm.adaptation.labelled import Labelled
from vlm.bundle import Bundle
from vlm.heads.zero_shot import encode_images

INTERVAL = 0.02  # seconds between two memory readings
SAMPLE = 32  # images that are timed
ROUNDS, LONGEST = 3, 5.0  # repetitions of a measurement, and seconds after which there are no more
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class ResourceMeter:
    """Context manager that measures `seconds` and the `peak` bytes of memory.

    The memory is an accelerator's, or else that of the whole process, including what it held
    before.
    """

    def __init__(self):
        self.seconds, self.peak = 0.0, 0
        self._done = threading.Event()

    def __enter__(self) -> "ResourceMeter":
        self._start = time.monotonic()
        self._read()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.monotonic() - self._start
        self._done.set()
        self._watcher.join()
        self._read()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._read()

    def _read(self) -> None:
        self.peak = max(self.peak, _bytes_in_use())


@dataclass(frozen=True)
class Estimate:
    """Expected time of a step, measured after warm-up.

    Attributes:
        low, high: range of the seconds of a step.
        warm_up: seconds before the measurement, which are spent already: compilation above all.
        once: seconds besides the steps.
    """

    low: float
    high: float
    warm_up: float = 0.0
    once: float = 0.0

    @classmethod
    def of(cls, times: Sequence[float], warm_up: float = 0.0, once: float = 0.0) -> "Estimate":
        """Make the estimate of measured steps: from the fastest to the slowest."""
        return cls(min(times), max(times), warm_up, once)

    def __mul__(self, count: float) -> "Estimate":
        """Return the estimate of a step that consists of `count` steps."""
        return Estimate(self.low * count, self.high * count, self.warm_up, self.once)


class OverBudget(Exception):
    """The work does not fit the budget: it needs up to `needed` seconds, and has `left`."""

    def __init__(self, message: str, needed: float, left: float):
        super().__init__(message)
        self.needed, self.left = needed, left

    @property
    def missing(self) -> float:
        """Seconds by which the budget is too small."""
        return self.needed - self.left


@dataclass(frozen=True)
class TimeBudget:
    """Time that is left for a method.

    Attributes:
        end: when the budget is spent, by `clock`.
        share_end: when this method should end, so that others have time too.
        report: called with the plan.
        clock: monotonic seconds.
    """

    end: float = math.inf
    share_end: float = math.inf
    report: Callable[[str], None] = lambda message: None
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - self.clock()

    def plan(self, estimate: Estimate, wanted: int = 1, least: int = 1, steps: str = "") -> int:
        """Return the number of steps that fit the share of the method: at most `wanted`.

        The slowest step that was measured counts. There are `least` steps even if these take more
        than the share, as long as they fit the whole budget. `steps` says in the plural what the
        steps are.

        Raises:
            OverBudget: `least` steps do not fit; the message has the numbers.
        """
        least, left = min(least, wanted), self.left
        needed = estimate.once + least * estimate.high
        if needed > left:
            raise OverBudget(
                f"{_described(estimate, least, steps)}, and {max(0.0, left):.3g} s were left"
                + _after(estimate),
                needed,
                left,
            )
        fitting = (self.share_end - self.clock() - estimate.once) / max(estimate.high, 1e-9)
        count = max(least, int(min(wanted, fitting)))
        self.report(_described(estimate, count, steps) + _after(estimate))
        return count


def _described(estimate: Estimate, count: int, steps: str) -> str:
    """Describe the range of the time of some steps."""
    total = _range(estimate.once + count * estimate.low, estimate.once + count * estimate.high)
    if not steps:
        return f"it takes {total}"
    each = _range(estimate.low, estimate.high)
    return f"{count:,} {steps} at {each} take {total}"


def _after(estimate: Estimate) -> str:
    return f" after {estimate.warm_up:.3g} s of warm-up" if estimate.warm_up >= 0.1 else ""


def _range(low: float, high: float) -> str:
    low_text, high_text = f"{low:.2g}", f"{high:.2g}"
    if high >= 10:
        low_text, high_text = f"{low:,.0f}", f"{high:,.0f}"
    return f"{high_text} s" if low_text == high_text else f"{low_text} to {high_text} s"


def measured(work: Callable[[], Any]) -> Estimate:
    """Measure some work: once for the warm-up, then up to `ROUNDS` times."""
    times: list[float] = []
    before = time.monotonic()
    while len(times) <= ROUNDS and (len(times) < 2 or sum(times[1:]) < LONGEST):
        jax.block_until_ready(work())
        now = time.monotonic()
        times.append(now - before)
        before = now
    return Estimate.of(times[1:], warm_up=max(0.0, times[0] - min(times[1:])))


def time_per_image(model: Bundle, labelled: Labelled, template: str) -> Estimate:
    """Estimate the seconds for an image and a sentence."""
    sample = list(labelled.images[:SAMPLE])
    names = [labelled.names[i] for i in labelled.target[:SAMPLE]]
    sentences = [template.replace("{}", name) for name in names]

    def encode() -> None:
        encode_images(model, sample)
        model.encode_text(sentences)

    return measured(encode) * (1 / len(sample))


def _bytes_in_use() -> int:
    on_devices = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.devices()]
    if any(value is not None for value in on_devices):
        return max(value or 0 for value in on_devices)
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:  # not Linux: the peak since the process started
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
