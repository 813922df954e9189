"""Time of this process in `goodput.jsonl` of the run folder."""

import datetime
import json
import time
from typing import IO, Any

import jax
from etils import epath

from vlm.errors import VlmError, first_line
from vlm.training.goodput import FILE, TimeTally
from vlm.training.history import read_rows
from vlm.training.watchdog import DATA, DEVICE, STEP, ActivityTimer

_OF_ACTIVITY = {
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

    As a context, it appends the rest of the time at its end, and how the run ended: "finished",
    "stopped" before its last step, or "failed" with an `error`. A killed process has no such line.

    Args:
        folder: run folder, whose lines so far are read.
        local: folder on this machine where the file grows.
        step: steps done before this start.
    """

    def __init__(self, folder: epath.Path, local: epath.Path, activity: ActivityTimer, step: int):
        self._activity, self._at = activity, activity.began
        self._end: dict[str, str] = {"end": "stopped"}
        self._first: int | None = step  # until the first step is done
        self._last = self._spent()
        self.tally = TimeTally()
        self._file: IO[str] | None = None
        if jax.process_index() == 0:
            rows = read_rows(folder / FILE)
            self.tally = TimeTally(rows)
            self._file = (local / FILE).open("w")
            began = {"step": step, "began": datetime.datetime.now(datetime.UTC).isoformat()}
            self._file.writelines(json.dumps(row) + "\n" for row in [*rows, began])
            self._file.flush()

    def __enter__(self) -> "GoodputLog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            kind_of = "" if isinstance(error, VlmError) else f"{kind.__name__}: "
            self._end = {"end": "failed", "error": kind_of + first_line(error)}
        self.record(self._activity.step, force=True)
        if self._file is not None:
            self._file.write(json.dumps({"step": self._activity.step, **self._end}) + "\n")
            self._file.close()

    def finish(self) -> None:
        """Note that the run is finished."""
        self._end = {"end": "finished"}

    def record(self, step: int, force: bool = False) -> None:
        """Append a line for the time up to now, in which the run came to `step`.

        Without `force`, it is only appended if the last line is long ago.
        """
        now, spent = time.monotonic(), self._spent()
        if not force and now - self._at < min(_MOST, _PART * (now - self._activity.began)):
            return
        if self._first is not None:
            step, self._first, row = self._first, None, {"start": now - self._activity.began}
        else:
            row = {name: spent[name] - self._last[name] for name in spent}
            row["other"] = max(0.0, now - self._at - sum(row.values()))
        self._last, self._at = spent, now
        if self._file is not None:
            row = {name: round(s, 3) for name, s in row.items() if s >= 0.001 or name == "start"}
            row = {"step": step, **row}
            self.tally.add(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def row(self) -> dict[str, float]:
        """Return the share of each purpose so far, for a row of the log."""
        return {f"goodput/{name}": share for name, share in self.tally.shares().items()}

    def _spent(self) -> dict[str, float]:
        spent = dict.fromkeys(_OF_ACTIVITY.values(), 0.0)
        for activity, purpose in _OF_ACTIVITY.items():
            spent[purpose] += self._activity.spent(activity)
        return spent
