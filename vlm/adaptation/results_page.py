"""`report.html` of an adaptation: what each method costs and reaches, on one page."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from vlm.adaptation.rows import ZERO_SHOT, Row, cells, columns_of
from vlm.evaluation.page import page, section

BAR, LINE, NAMES = 420, 26, 110  # the drawing's measures


def write_page(path: Path, rows: Sequence[Row], chosen: str, about: Mapping[str, str]) -> None:
    """Write the page, which needs nothing but itself."""
    sections = [
        section(
            "Methods",
            "Chosen by the validation part alone. Each accuracy with its 95% interval; memory is "
            "the most while the method ran, of an accelerator or else of the whole process.",
            table(rows, chosen),
        ),
        *(
            section(
                f"Accuracy: {title}",
                "",
                f'<div class="chart card">{_bars(rows, chosen, name)}</div>',
            )
            for title, name in columns_of(rows).items()
        ),
        section("What was done", "", _facts(about)),
    ]
    lead = f"{about['model']} adapted to {about['data']}: {chosen}."
    foot = [
        "Nothing was chosen by the test data or by the data out of distribution.",
        "An interval on few validation images is wide, and the choice no surer than that. "
        "The chosen figure is the best of several on these images: a test set measures it afresh.",
    ]
    path.write_text(page("Adaptation", lead, sections, foot))


def table(rows: Sequence[Row], chosen: str) -> str:
    """The table of all methods, the chosen one marked."""
    columns = columns_of(rows)
    heads = "".join(
        f"<th>{escape(name)}</th>"
        for name in ("method", "trained", "time", "memory", *columns, "note")
    )
    lines = []
    for row in rows:
        shade = ' class="is-right"' if row.method == chosen else ""
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, columns))
        lines.append(f"<tr{shade}>{values}</tr>")
    return (
        f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _bars(rows: Sequence[Row], chosen: str, field: str) -> str:
    """A line for each method: its interval as a bar, its value as a dot, zero-shot as a rule."""
    values = {row.method: getattr(row, field) for row in rows}
    values = {name: metric for name, metric in values.items() if metric is not None}
    height = LINE * len(values) + 24
    base = values[ZERO_SHOT].value
    parts = [
        f'<line class="rule" x1="{_x(t)}" x2="{_x(t)}" y1="0" y2="{height - 20}"/>'
        f'<text class="tick" x="{_x(t)}" y="{height - 4}" text-anchor="middle">{t:.0%}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts.append(
        f'<line class="c2" stroke="currentColor" stroke-dasharray="4 4" x1="{_x(base)}" '
        f'x2="{_x(base)}" y1="0" y2="{height - 20}"/>'
    )
    for number, (name, metric) in enumerate(values.items()):
        y = LINE * number + LINE / 2
        shade = "c1" if name == chosen else "c0"
        parts.append(
            f'<text class="tick" x="{NAMES - 10}" y="{y + 4}" text-anchor="end">{escape(name)}'
            f'</text><rect class="band {shade}" x="{_x(metric.low)}" y="{y - 5}" height="10" '
            f'width="{_x(metric.high) - _x(metric.low):.1f}"/>'
            f'<circle class="dot {shade}" cx="{_x(metric.value)}" cy="{y}" r="4">'
            f"<title>{escape(name)}: {escape(str(metric))}</title></circle>"
        )
    return (
        f'<svg viewBox="0 0 {NAMES + BAR + 30} {height}" role="img" '
        f'aria-label="accuracy by method" style="max-width:720px">{"".join(parts)}</svg>'
    )


def _x(share: float) -> float:
    return round(NAMES + BAR * share, 1)


def _facts(about: Mapping[str, str]) -> str:
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in about.items()
    )
    return f'<dl class="card">{cells}</dl>'
