"""What a run is doing and for how long: the parts of its time, and a word when it stands still."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator

import jax

from vlm._deprecation import environment
from vlm.cluster import watch
from vlm.train.console import print_on_first_process

# Seconds without a change of activity after which the run says what it waits for.
STALL_WARNING = environment("VLM_STALL_WARNING", "VLM_STALL", 60)

DATA = "waiting for data"
DEVICE = "waiting for the device"
STEP = "starting a step"  # the first time compiles it


class ActivityTimer:
    """Says what the run is doing: `with activity(DATA): ...`, one inside the other if need be.

    `seconds` has the time of each activity so far. As a context, it is a watchdog: if an activity
    lasts longer than `VLM_STALL_WARNING` seconds, process 0 logs the activity, the step and what
    the other processes are doing; then again after twice the time, and so on.
    """

    def __init__(self):
        self.seconds: collections.Counter[str] = collections.Counter()
        self.began = time.monotonic()
        self.step = 0
        self._now, self._since = "", self.began
        self._over = threading.Event()

    @contextlib.contextmanager
    def __call__(self, doing: str) -> Iterator[None]:
        outer, began = self._now, time.monotonic()
        self._now, self._since = doing, began
        try:
            yield
        finally:
            now = time.monotonic()
            self.seconds[doing] += now - began
            self._now, self._since = outer, now

    def __enter__(self) -> "ActivityTimer":
        threading.Thread(target=self._watch, name="vlm-activity", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()

    def summary(self) -> str:
        """Where the time went, the largest part first."""
        whole = time.monotonic() - self.began
        parts = ", ".join(f"{doing} {s / whole:.1%}" for doing, s in self.seconds.most_common())
        return f"{whole:.0f} s in all: {parts}"

    def _watch(self) -> None:
        since, patience = self._since, STALL_WARNING
        while not self._over.wait(min(1.0, STALL_WARNING / 4)):
            watch.set_activity(f"{self._doing} at step {self.step}")
            if self._since != since:
                since, patience = self._since, STALL_WARNING
            elif time.monotonic() - since > patience:
                patience *= 2
                print_on_first_process(self._what_it_waits_for(time.monotonic() - since))

    @property
    def _doing(self) -> str:
        return self._now or ("between two steps" if self.step else "starting")

    def _what_it_waits_for(self, seconds: float) -> str:
        said = f"the run has been {self._doing} for {seconds:.0f} s, at step {self.step}"
        if jax.process_count() > 1:
            ours = f"{self._doing} at step {self.step}"
            said += others({i: of for i, of in watch.activities().items() if of[1] != ours})
        return said


def others(told: dict[int, tuple[str, str]]) -> str:
    """What other processes are doing, by (host, what it told) of each: the end of a sentence."""
    by_doing: dict[str, list[str]] = {}
    for process, (host, doing) in told.items():
        by_doing.setdefault(doing, []).append(f"{process} on {host}")
    said = ""
    for doing, who in by_doing.items():
        more = f" and {len(who) - 4} more" if len(who) > 4 else ""
        noun, verb = ("process", "is") if len(who) == 1 else ("processes", "are")
        said += f"; {noun} {', '.join(who[:4])}{more} {verb} {doing}"
    return said
