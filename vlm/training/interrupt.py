"""Stop a run early on Ctrl-C, SIGTERM, a closed terminal or a cluster's preemption notice."""

import itertools
import os
import signal
import time

import jax
from jax.experimental import multihost_utils

from vlm._deprecation import environment
from vlm.training.console import drop_output

# Seconds between a preemption notice and the shutdown: 30 on Google Cloud and, unless
# terminationGracePeriodSeconds is set, in Kubernetes.
SHUTDOWN_GRACE = environment("VLM_SHUTDOWN_GRACE", "VLM_GRACE", 30)

# Numbers of the calls that ask JAX for a stop. JAX stops at the first number after those that the
# processes have asked for when the notice comes, and compares it for equality. So they rise by one
# from 1: a notice that comes before the first call would be lost if that had the number of a step.
_CALLS = itertools.count(1)


class Interrupted:
    """Handler of requests to stop the run. A second Ctrl-C stops at once.

    SIGHUP comes when the terminal or ssh session of the run closes; after that, output to the
    terminal is dropped. A run that ignores it (nohup) goes on.

    With several processes, JAX catches SIGTERM (also sent by preemption notices) in any of them
    and finds the next step that all can reach.
    """

    def __enter__(self) -> "Interrupted":
        self._asked: float | None = None  # time of the request
        self._single_process = jax.process_count() == 1
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        signals = [signal.SIGINT, *([signal.SIGTERM] if self._single_process else [])]
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
            signals.append(hang_up)
        self._previous = {s: signal.signal(s, self._ask) for s in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        drop_output(*(stream for stream in self._terminals if not os.isatty(stream)))
        self._asked = time.monotonic()
        if not self._single_process:
            signal.raise_signal(signal.SIGTERM)

    def request(self) -> None:
        """Ask the run to stop, as SIGTERM does; one process is enough."""
        self._ask(signal.SIGTERM, None)

    def is_due(self) -> bool:
        """Whether to stop now. All processes call it before each step, with equal results."""
        if self._single_process:
            return self._asked is not None
        stop = multihost_utils.reached_preemption_sync_point(next(_CALLS))
        if stop and self._asked is None:
            self._asked = time.monotonic()
        return stop

    def announce(self, step: int, seconds: float | None, newest: int | None) -> str:
        """Return the message to log before the last save.

        Args:
            step: the step to save.
            seconds: duration of the previous checkpoint's write, if there was one.
            newest: step of the newest complete checkpoint.
        """
        asked = time.monotonic() if self._asked is None else self._asked
        left = SHUTDOWN_GRACE - (time.monotonic() - asked)
        message = f"stop requested: saving step {step}"
        if seconds is not None and seconds > left:
            fallback = "step 0" if newest is None else f"step {newest}"
            message += (
                f"; the last checkpoint took {seconds:.0f} s and {max(left, 0):.0f} s of the "
                f"{SHUTDOWN_GRACE:.0f} s shutdown grace period (VLM_SHUTDOWN_GRACE) are left: if "
                f"the machine shuts down first, the run resumes from {fallback}"
            )
        return message
