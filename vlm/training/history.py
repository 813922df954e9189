"""History of a run: a row of `history.jsonl` for each start, phase and rollback.

Also how rows of its JSONL files are read and appended.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from vlm._json import to_json
from vlm.errors import brief
from vlm.paths import as_config_error, replace_text

FILE = "history.jsonl"


def read_rows(file: epath.Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file such as the log, skipping truncated lines."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class RowWriter:
    """Appends rows to a JSONL file on a disk, which starts with `rows`.

    Raises:
        ConfigError: the file cannot be written, for example on a full disk.
    """

    def __init__(self, file: epath.Path, rows: Iterable[Mapping[str, Any]]):
        self._file = file
        with self._errors():
            replace_text(file, _lines(rows))
            self._open_file = file.open("a")

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, which readers see at once."""
        with self._errors():
            self._open_file.write(_lines(rows))
            self._open_file.flush()

    def close(self) -> None:
        """Close the file; `write` has raised the errors of its rows."""
        with contextlib.suppress(OSError):
            self._open_file.close()

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        fix = "make it writable or free disk space, and resume the run"
        return as_config_error(f"{self._file} cannot be written", fix)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(to_json(row) + "\n" for row in rows)


def read_history(folder: epath.Path) -> list[dict[str, Any]]:
    """Return the history of the run in a folder, oldest row first."""
    return read_rows(folder / FILE)


def history_text(rows: list[dict[str, Any]]) -> str:
    """Describe each start, phase and rollback of a run in a line, with details in lines below."""
    lines = []
    for number, row in enumerate(rows):
        verb = "resumed at" if number else "started at"
        if "phase" in row:
            verb = f"phase {row['phase']} from"
        if "rollback" in row:
            verb = f"rollback {row['rollback']['rollbacks']} from {row['rollback']['left']:,} to"
        lines.append(
            f"{row['time']}  {verb} step {row['step']:,} of {row['total_steps']:,} on "
            f"{row['devices']}, processes: {row['processes']}, vlm {row['vlm']}, jax {row['jax']}"
        )
        for name, (old, new) in row["changes"].items():
            lines.append(f"    {name}: {brief(old)} -> {brief(new)}")
        for name, (old, new) in row.get("fitted", {}).items():
            lines.append(f"    {name}: {brief(new)} on these devices, and not {brief(old)}")
        if "rollback" in row:
            lines.append(f"    {row['rollback']['reason']}")
        if row.get("data"):
            lines.append(f"    the data {row['data']}")
    return "\n".join(lines)
