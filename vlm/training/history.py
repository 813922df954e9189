"""History of a run: a row of `history.jsonl` for each start, phase and rollback."""

import json
from typing import Any

from etils import epath

from vlm.errors import brief

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
