"""Goodput of a run: shares of its time by purpose, over all of its starts.

`goodput.jsonl` of the run folder grows over all starts. The first line of each has `began`. Other
lines have the seconds of each purpose since the line before, and the step at its end. If a later
line has an earlier step, the run went back to it: the work after that step is lost.
"""

from collections.abc import Iterable, Mapping
from typing import Any

FILE = "goodput.jsonl"
# In the order of reports. `lost` is work that was done again, and the time of rollbacks; `start` is
# all time before the first step, which compiles; `other` is the rest, such as exporting the bundle.
PURPOSES: tuple[str, ...] = (
    "compute",
    "data",
    "checkpoint",
    "evaluation",
    "start",
    "lost",
    "other",
)


class TimeTally:
    """Seconds of each purpose, and the number of starts, from the lines of a run in their order.

    Example:
        >>> from vlm.training.goodput import TimeTally
        >>> first = [{"step": 0, "start": 5.0}, {"step": 9, "compute": 2.0, "data": 1.0}]
        >>> resumed = [{"step": 0, "start": 4.0}, {"step": 20, "compute": 8.0}]
        >>> {name: s for name, s in TimeTally(first + resumed).seconds.items() if s}
        {'compute': 8.0, 'start': 9.0, 'lost': 3.0}
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self.seconds, self.starts = dict.fromkeys(PURPOSES, 0.0), 0
        self._kept: list[tuple[int, dict[str, float]]] = []
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a line: the work of earlier lines of later steps is lost.

        A line without times only counts if it begins a start.
        """
        self.starts += "began" in row
        seconds = {name: row[name] for name in PURPOSES if name in row}
        if not seconds:
            return
        while self._kept and self._kept[-1][0] > row["step"]:
            for name, value in self._kept.pop()[1].items():
                if name != "start":
                    self.seconds[name] -= value
                    self.seconds["lost"] += value
        for name, value in seconds.items():
            self.seconds[name] += value
        self._kept.append((row["step"], seconds))

    def shares(self) -> dict[str, float]:
        """Return the fraction of time of each purpose; goodput is that of "compute"."""
        total = sum(self.seconds.values())
        return {name: max(0.0, s / total) if total else 0.0 for name, s in self.seconds.items()}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {share:.1%}" for name, share in self.shares().items())
        starts = f"{self.starts} start{'s' if self.starts != 1 else ''}"
        return f"goodput over {starts}, {sum(self.seconds.values()):,.0f} s: {parts}"
