"""Leaving a run early: Ctrl-C, SIGTERM and the preemption notices of clusters."""

import signal
import time

import jax
from jax.experimental import multihost_utils

from vlm._deprecation import environment

# Seconds between a notice of preemption and the end: 30 on Google's machines and in Kubernetes,
# unless its terminationGracePeriodSeconds says more.
SHUTDOWN_GRACE = environment("VLM_SHUTDOWN_GRACE", "VLM_GRACE", 30)


class Interrupted:
    """Whether the run was asked to leave. A second Ctrl-C stops at once.

    With several processes, JAX hears SIGTERM (the form that preemption notices take) in any of
    them and finds the next step that all can reach.
    """

    def __enter__(self) -> "Interrupted":
        self._asked: float | None = None  # when
        self._alone = jax.process_count() == 1
        signals = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        self._previous = {s: signal.signal(s, self._ask) for s in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = time.monotonic()
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Whether to leave before `step`. All processes ask at each step and hear the same."""
        if self._alone:
            return self._asked is not None
        leave = multihost_utils.reached_preemption_sync_point(step)
        if leave and self._asked is None:
            self._asked = time.monotonic()
        return leave

    def announce(self, step: int, seconds: float | None, newest: int | None) -> str:
        """What to say before the last save, given how long the last checkpoint took to write."""
        asked = time.monotonic() if self._asked is None else self._asked
        left = SHUTDOWN_GRACE - (time.monotonic() - asked)
        said = f"asked to leave: saving step {step}"
        if seconds is not None and seconds > left:
            fallback = "step 0" if newest is None else f"step {newest}"
            said += (
                f"; the last checkpoint took {seconds:.0f} s and {max(left, 0):.0f} s of the "
                f"{SHUTDOWN_GRACE:.0f} s shutdown grace period (VLM_SHUTDOWN_GRACE) are left: if "
                f"the machine goes first, the run goes on from {fallback}"
            )
        return said
