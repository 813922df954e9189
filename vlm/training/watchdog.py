"""Time accounting for a run, and a watchdog that reports stalls."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax

from vlm._deprecation import environment
from vlm.cluster import watch
from vlm.training.console import log

# Seconds without a change of activity after which the current one is logged.
STALL_WARNING = environment("VLM_STALL_WARNING", "VLM_STALL", 60)

DATA = "waiting for data"
DEVICE = "waiting for the device"
STEP = "starting a step"  # the first time compiles it


class ActivityTimer:
    """Timer of named activities: `with timed(DATA): ...`, which may be nested.

    `seconds` has the total time of each activity. As a context, it is a watchdog: if an activity
    lasts longer than `VLM_STALL_WARNING` seconds, process 0 logs the activity, the step and what
    the other processes are doing; then again after twice the time, and so on. Its thread also
    calls `heartbeat` each second.
    """

    heartbeat: Callable[[], None] | None = None

    def __init__(self):
        self.seconds: collections.Counter[str] = collections.Counter()
        self.began = time.monotonic()
        self.step = 0
        self._now, self._since = "", self.began
        self._over, self._changing = threading.Event(), threading.Lock()

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        outer, began = self._now, time.monotonic()
        with self._changing:
            self._now, self._since = activity, began
        try:
            yield
        finally:
            now = time.monotonic()
            with self._changing:
                self.seconds[activity] += now - began
                self._now, self._since = outer, now

    def spent(self, activity: str) -> float:
        """Return the total seconds of an activity, with those since it began if it goes on."""
        with self._changing:
            going_on = time.monotonic() - self._since if self._now == activity else 0.0
            return self.seconds[activity] + going_on

    def __enter__(self) -> "ActivityTimer":
        threading.Thread(target=self._watch, name="vlm-activity", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()

    def summary(self) -> str:
        """Return the fraction of time of each activity, the largest first."""
        total = time.monotonic() - self.began
        parts = ", ".join(f"{name} {s / total:.1%}" for name, s in self.seconds.most_common())
        return f"{total:.0f} s in all: {parts}"

    def _watch(self) -> None:
        since, limit = self._since, STALL_WARNING
        while not self._over.wait(min(1.0, STALL_WARNING / 4)):
            watch.set_activity(f"{self._activity} at step {self.step}")
            if (heartbeat := self.heartbeat) is not None:
                heartbeat()
            if self._since != since:
                since, limit = self._since, STALL_WARNING
            elif time.monotonic() - since > limit:
                limit *= 2
                log.warning(self._stall_message(time.monotonic() - since))

    @property
    def _activity(self) -> str:
        return self._now or ("between two steps" if self.step else "starting")

    def _stall_message(self, seconds: float) -> str:
        message = f"the run has been {self._activity} for {seconds:.0f} s, at step {self.step}"
        if jax.process_count() > 1:
            own = f"{self._activity} at step {self.step}"
            differing = {i: other for i, other in watch.activities().items() if other[1] != own}
            message += describe_processes(differing)
        return message


def describe_processes(activities: dict[int, tuple[str, str]]) -> str:
    """Format (host, activity) by process as the end of a sentence, grouped by activity."""
    by_activity: dict[str, list[str]] = {}
    for process, (host, activity) in activities.items():
        by_activity.setdefault(activity, []).append(f"{process} on {host}")
    text = ""
    for activity, processes in by_activity.items():
        more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
        noun, verb = ("process", "is") if len(processes) == 1 else ("processes", "are")
        text += f"; {noun} {', '.join(processes[:4])}{more} {verb} {activity}"
    return text
