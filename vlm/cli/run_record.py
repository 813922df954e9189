"""Record of a run, read from its folder while it goes on or later, without JAX."""

import dataclasses
import datetime
import functools
import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from vlm.errors import CheckpointError
from vlm.paths import as_config_error, is_run
from vlm.training import goodput, history

# Seconds without a new line after which the process of a run may be gone: while it lives, it writes
# to goodput.jsonl every half a minute, whatever it does.
_SILENT = 150.0
# Seconds without a new step after which that is a status of its own.
_SLOW = 150.0


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Files of a run folder.

    Attributes:
        config: the experiment, as JSON values.
        rows: rows of log.jsonl.
        starts: rows of history.jsonl: starts, phases and rollbacks.
        times: rows of goodput.jsonl.
        quiet: seconds since the process of the run last wrote; None if it never did.
        problem: why the folder cannot be read; empty if it can.
    """

    folder: epath.Path
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    times: list[dict[str, Any]]
    quiet: float | None
    problem: str = ""

    @classmethod
    def read(cls, folder: epath.Path) -> "RunRecord":
        """Read a run folder.

        Raises:
            CheckpointError: no run there.
            ConfigError: a file cannot be read.
        """
        if not is_run(folder):
            raise CheckpointError(
                f"{folder} is no run folder (it has no config.json): give folders made by `vlm "
                "train`, or a folder of them"
            )
        with as_config_error(f"{folder} cannot be read", "check the path and its permissions"):
            try:
                config = json.loads((folder / "config.json").read_text())
            except ValueError as error:
                raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from None
            log, times = folder / "log.jsonl", folder / goodput.FILE
            files = [file for file in (log, times) if file.exists()]
            changed = [file.stat().mtime for file in files]
            return cls(
                folder,
                config,
                history.read_rows(log),
                history.read_history(folder),
                history.read_rows(times),
                time.time() - max(changed) if changed else None,
            )

    @classmethod
    def unreadable(cls, folder: epath.Path, problem: str) -> "RunRecord":
        """Return the record of a folder that cannot be read, with the reason."""
        return cls(folder, {}, [], [], [], None, problem)

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Rows of the log that have a loss."""
        return [row for row in self.rows if "loss" in row]

    @property
    def step(self) -> int:
        """Steps done, as far as the log goes."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total(self) -> int | None:
        """Steps of the run; None before its first start is recorded."""
        return self.starts[-1]["total_steps"] if self.starts else None

    @property
    def rollbacks(self) -> list[dict[str, Any]]:
        """Rows of history.jsonl that are rollbacks."""
        return [row for row in self.starts if "rollback" in row]

    @functools.cached_property
    def tally(self) -> goodput.TimeTally:
        """Time by purpose, over all starts."""
        return goodput.TimeTally(self.times)

    @functools.cached_property
    def step_times(self) -> dict[str, float]:
        """Seconds by purpose since the step number last changed, up to the last line."""
        seconds = dict.fromkeys(goodput.PURPOSES, 0.0)
        for before, row in reversed(list(itertools.pairwise(self.times))):
            if before["step"] != row["step"] or "began" in row:
                break
            for name in seconds:
                seconds[name] += row.get(name, 0.0)
        return seconds

    @property
    def status(self) -> str:
        """Status of the run: one of those listed in vlm/docs/howto/operate.md."""
        if self.problem:
            return "unreadable"
        end = self.times[-1] if self.times else {}
        if "end" in end:
            return end["end"]
        if self.quiet is None:
            return "not started"
        if self.quiet >= _SILENT:
            return "no heartbeat"
        return "going on" if self._since_step < _SLOW else "no new step"

    @property
    def _since_step(self) -> float:
        """Seconds since the step number of a run that goes on last changed."""
        return sum(self.step_times.values()) + (self.quiet or 0.0)

    @property
    def reason(self) -> str:
        """Explanation of the status; empty if it needs none."""
        status = self.status
        if status == "unreadable":
            return self.problem
        if status == "failed":
            return self.times[-1].get("error", "")
        if status == "no heartbeat":
            assert self.quiet is not None
            silent = datetime.timedelta(seconds=round(self.quiet))
            return (
                f"Its process has written nothing for {silent}: it was killed, hangs, or is being "
                "resumed. Two processes would damage the run, so check on its hosts that none is "
                f"left before vlm train --resume {self.folder}"
            )
        if status == "no new step":
            time_ago = datetime.timedelta(seconds=round(self._since_step))
            since = datetime.datetime.now().astimezone() - time_ago
            purpose = max(self.step_times, key=self.step_times.__getitem__)
            return (
                f"Its process is alive, and its step number has been {self.times[-1]['step']:,} "
                f"for {time_ago}, since {since:%Y-%m-%d %H:%M:%S %z} (goodput counts most of this "
                f'time as "{purpose}"): it compiles, evaluates, takes long steps, or hangs'
            )
        if status == "stopped":
            return f"Resume it with vlm train --resume {self.folder}"
        return ""

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of a metric, where the log has it."""
        points = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return list(steps), list(values)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric; None without one."""
        values = self.column(name)[1]
        return values[-1] if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
