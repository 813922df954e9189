"""Time of this process in `goodput.jsonl` of the run folder."""

import contextlib
import datetime
import threading
import time
from typing import Any

import jax
from etils import epath

from vlm.errors import ConfigError, VlmError, first_line
from vlm.training.goodput import FILE, TimeTally
from vlm.training.history import RowWriter, read_rows
from vlm.training.watchdog import DATA, DEVICE, STEP, ActivityTimer

_PURPOSE_OF = {
    STEP: "compute",
    DEVICE: "compute",
    DATA: "data",
    "writing a checkpoint": "checkpoint",
    "waiting for the last checkpoint": "checkpoint",
    "evaluating": "evaluation",
    "rolling back": "lost",
}
# Seconds between two lines: at most so many, and a part of the time so far.
_MOST, _PART = 30.0, 0.05


class GoodputLog:
    """Appends the time of this process to the file of the run; only process 0 writes.

    As a context, it also appends lines while a step or another activity lasts, from the thread of
    `activity`. So the file grows while the process lives, and if the main thread hangs, the step of
    its lines stays the same. At its end it appends the rest of the time, and how the run ended:
    "finished", "stopped" before its last step, or "failed" with an `error`. A killed process has
    no such line.

    Args:
        folder: run folder, whose lines so far are read.
        local: folder on this machine where the file grows.
    """

    def __init__(self, folder: epath.Path, local: epath.Path, activity: ActivityTimer):
        self._activity, self._at = activity, activity.began
        self._end: dict[str, str] = {"end": "stopped"}
        self._step, self._starting = 0, True  # until the first step is done
        self._last = self._spent()
        self._recording = threading.Lock()
        self.tally = TimeTally()
        self._file: RowWriter | None = None
        if jax.process_index() == 0:
            rows = read_rows(folder / FILE)
            self.tally = TimeTally(rows)
            self._step = rows[-1]["step"] if rows else 0
            began = {"step": self._step, "began": datetime.datetime.now(datetime.UTC).isoformat()}
            self.tally.add(began)
            self._file = RowWriter(local / FILE, [*rows, began])

    def __enter__(self) -> "GoodputLog":
        self._activity.heartbeat = self._beat
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            kind_of = "" if isinstance(error, VlmError) else f"{kind.__name__}: "
            self._end = {"end": "failed", "error": kind_of + first_line(error)}
        self._activity.heartbeat = None
        try:
            self.record(self._reached, force=True)
            if self._file is not None:
                self._file.write({"step": self._reached, **self._end})
        except ConfigError:
            if error is None:  # never hide an earlier error
                raise
        finally:
            with self._recording:
                file, self._file = self._file, None
            if file is not None:
                file.close()

    def restored(self, step: int) -> None:
        """Note the steps done before this start, which begins at a checkpoint."""
        with self._recording:
            self._step = step

    def finish(self) -> None:
        """Note that the run is finished."""
        self._end = {"end": "finished"}

    def record(self, step: int, force: bool = False) -> None:
        """Append a line for the time up to now, in which the run came to `step`.

        The first one ends the start of the run. Without `force`, it is only appended if the last
        line is long ago, and its step is that of the last line if that is later.
        """
        with self._recording:
            step = step if force else max(step, self._step)
            if self._add(step, force):
                self._step, self._starting = step, False

    def _beat(self) -> None:
        """Append a line for the time up to now, if the last line is long ago, in any thread."""
        with self._recording, contextlib.suppress(ConfigError):  # `record` raises it, too
            step = self._reached
            if self._add(step, False):
                self._step = step

    @property
    def _reached(self) -> int:
        """The step that the run has come to; logs are some steps behind it."""
        return max(self._step, self._activity.step)

    def _add(self, step: int, force: bool) -> bool:
        now, spent = time.monotonic(), self._spent()
        if not force and now - self._at < min(_MOST, _PART * (now - self._activity.began)):
            return False
        if self._starting:
            step, row = self._step, {"start": now - self._at}
        else:
            row = {name: spent[name] - self._last[name] for name in spent}
            row["other"] = max(0.0, now - self._at - sum(row.values()))
        self._last, self._at = spent, now
        if self._file is not None:
            row = {name: round(s, 3) for name, s in row.items() if s >= 0.001 or name == "start"}
            row = {"step": step, **row}
            self.tally.add(row)
            self._file.write(row)
        return True

    def row(self) -> dict[str, float]:
        """Return the share of each purpose so far, for a row of the log."""
        return {f"goodput/{name}": share for name, share in self.tally.shares().items()}

    def _spent(self) -> dict[str, float]:
        spent = dict.fromkeys(_PURPOSE_OF.values(), 0.0)
        for activity, purpose in _PURPOSE_OF.items():
            spent[purpose] += self._activity.spent(activity)
        return spent
