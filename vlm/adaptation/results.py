"""Cost and accuracy of each adaptation method, and their table and page."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm._html import render
from vlm.adaptation.class_report import FEW_CLASSES, ClassReport
from vlm.evaluation.charts import interval_chart
from vlm.evaluation.intervals import Metric

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Row:
    """Cost and accuracy of one method; without figures if it was left out.

    Attributes:
        trained: parameters.
        seconds: duration of the trial.
        peak: most memory during the trial, in bytes.
        validation, test, shifted: top-1; None if not measured.
        note: choices of the method, or the reason why it was skipped.
    """

    method: str
    trained: int = 0
    seconds: float = 0.0
    peak: int = 0
    validation: Metric | None = None
    test: Metric | None = None
    shifted: Metric | None = None
    note: str = ""


def accuracy_columns(rows: Sequence[Row]) -> dict[str, str]:
    """Return the accuracies that some row has: field by title."""
    fields = {"validation": "validation", "test": "test", "out of distribution": "shifted"}
    return {
        title: name
        for title, name in fields.items()
        if any(getattr(row, name) is not None for row in rows)
    }


def headings(rows: Sequence[Row]) -> list[str]:
    """Return the headings of the table."""
    return ["method", "trained", "time", "memory", *accuracy_columns(rows), "note"]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of the table."""
    columns = accuracy_columns(rows).values()
    return [
        [row.method, *[""] * (3 + len(columns)), f"left out: {row.note}"]
        if row.validation is None
        else [
            row.method,
            f"{row.trained:,}",
            f"{row.seconds:.1f} s",
            f"{row.peak / 1e6:,.0f} MB",
            *(_short(getattr(row, name)) for name in columns),
            row.note,
        ]
        for row in rows
    ]


def html_table(rows: Sequence[Row], chosen: str) -> str:
    """Render the table of all methods with the chosen one marked."""
    return render("table.html", headings=headings(rows), rows=cells(rows), highlighted=chosen)


def reason(rows: Sequence[Row], chosen: str) -> str:
    """Explain the choice: the best accuracy, the next one, and whether they can be told apart."""
    measured = {row.method: row.validation for row in rows if row.validation is not None}
    best = measured.pop(chosen)
    sentence = f"{chosen} has the best accuracy on the validation images: {best}."
    if not measured:
        return sentence
    name, other = max(measured.items(), key=lambda item: item[1].value)
    sentence += f" The next is {name} with {other.value:.1%}"
    if other.value < best.value:
        close = other.high >= best.low and other.value >= best.low
        told = ", within the 95% interval: the difference is not significant" if close else ""
        return f"{sentence}{told}."
    return f"{sentence} too: of equal methods, the one with the higher likelihood is chosen."


def write_page(
    path: Path,
    rows: Sequence[Row],
    chosen: str,
    about: Mapping[str, str],
    report: ClassReport | None = None,
) -> None:
    """Write `report.html`, self-contained: choice, methods, classes, mistakes and setup."""
    folder = shlex.quote(str(path.parent))
    classes: dict[str, Any] = {"classes": [], "measured": ""}
    if report is not None:
        where = f"{chosen} on {len(report.target):,} {report.split} images"
        classes = {
            "classes": report.rows(),
            "few": FEW_CLASSES,
            "measured": where,
            "matrices": report.matrices(),
            "confusions": report.confusions(),
            "mistakes": report.mistakes(),
        }
    charts = []
    for title, name in accuracy_columns(rows).items():
        values = {row.method: getattr(row, name) for row in rows if getattr(row, name) is not None}
        charts.append((title, interval_chart(values, values[ZERO_SHOT].value, chosen)))
    html = render(
        "adaptation/results.html",
        title="Adaptation",
        lead=f"{about['model']} adapted to {about['data']}: {chosen}.",
        headings=headings(rows),
        rows=cells(rows),
        chosen=chosen,
        why=reason(rows, chosen),
        commands=[
            f"vlm classify photo.jpg --model {folder}",
            f'vlm search photos/ "a text" --model {folder}',
            f"vlm export {folder} program --format onnx",
        ],
        charts=charts,
        **classes,
        about=about,
        footnotes=[
            "Nothing was chosen by the test data or by the out-of-distribution data.",
            "With few validation images intervals are wide, and the choice is as uncertain. The "
            "chosen figure is the best of several on these images: measure again on a test set.",
        ],
    )
    path.write_text(html)


def _short(metric: Metric | None) -> str:
    if metric is None:
        return ""
    return f"{metric.value:.1%} [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"
