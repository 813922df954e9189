"""What one method cost and reached, and how a table says it."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.evaluation.intervals import Metric

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Row:
    """What one method cost and reached; nothing of one that was left out, but why.

    Attributes:
        trained: parameters. seconds: of the try. peak: bytes of memory, the most during it.
        validation, test, shifted: top-1; of what was not asked for, None.
        note: what the method chose, or why it was left out.
    """

    method: str
    trained: int = 0
    seconds: float = 0.0
    peak: int = 0
    validation: Metric | None = None
    test: Metric | None = None
    shifted: Metric | None = None
    note: str = ""


def columns_of(rows: Sequence[Row]) -> dict[str, str]:
    """The measures that there are: their titles, and the fields of a row."""
    fields = {"validation": "validation", "test": "test", "out of distribution": "shifted"}
    return {
        title: name
        for title, name in fields.items()
        if any(getattr(row, name) is not None for row in rows)
    }


def cells(row: Row, columns: dict[str, str]) -> list[str]:
    """What a table says of a method."""
    if row.validation is None:
        return [row.method, *[""] * (3 + len(columns)), f"left out: {row.note}"]
    values = [interval(getattr(row, name)) for name in columns.values()]
    return [
        row.method,
        f"{row.trained:,}",
        f"{row.seconds:.1f} s",
        f"{row.peak / 1e6:,.0f} MB",
        *values,
        row.note,
    ]


def interval(metric: Metric | None) -> str:
    """A share with its interval, short."""
    if metric is None:
        return ""
    return f"{metric.value:.1%} [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"
