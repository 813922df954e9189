"""Leaving a run early: Ctrl-C, SIGTERM and the preemption notices of clusters."""

import signal

import jax
from jax.experimental import multihost_utils


class Interrupted:
    """Whether the run was asked to leave. A second Ctrl-C stops at once.

    With several processes, JAX hears SIGTERM (the form that preemption notices take) in any of
    them and finds the next step that all can reach.
    """

    def __enter__(self) -> "Interrupted":
        self._asked = False
        self._alone = jax.process_count() == 1
        signals = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        self._previous = {s: signal.signal(s, self._ask) for s in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Whether to leave before `step`. All processes ask at each step and hear the same."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)
