"""`report.html` of an evaluation: one page that needs nothing but itself; two runs side by side."""

import os
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from etils import epath

from vlm.evaluation.classification import confusion, reliability
from vlm.evaluation.comparison import Comparison
from vlm.evaluation.page import page, section
from vlm.evaluation.report import footnotes, results_table
from vlm.evaluation.results_folder import SHOWN, Gallery, best_and_worst
from vlm.evaluation.runner import Report, Result

CLASSES = 30  # shown of a confusion matrix: those of the most errors
SIDE = 260  # of a diagram, in pixels


def write_page(
    path: str | os.PathLike,
    report: Report,
    other: Report | None = None,
    comparisons: Sequence[Comparison] = (),
    galleries: Sequence[Mapping[str, Gallery]] = (),
) -> None:
    """Write the page of a report, or of two side by side with what sets them apart.

    Args:
        path: of the page, local or remote.
        report: with the samples of its results, if they are to be shown.
        other: another report.
        comparisons: of the two.
        galleries: for each report, pictures of some of its queries, by task.
    """
    seen = [*galleries, {}, {}][:2]
    compared = _compared(comparisons) + "".join(
        _sets_apart(c, *(gallery.get(c.task, {}) for gallery in seen)) for c in comparisons
    )
    sections = [section("Comparison", "B against A, by paired tests.", compared)]
    reports = [report] if other is None else [report, other]
    for name, one in zip(("A", "B") if other else ("",), reports, strict=True):
        model = one.results[0].provenance.model
        title = f"{name}: {model}" if name else "Results"
        note = "Each with its 95% confidence interval, over n queries. Ties count as misses."
        sections.append(section(title, note, results_table(one)))
    for result in report.results:
        pair = [result]
        if other is not None:
            pair += [r for r in other.results if r.task == result.task]
        pictures = [gallery.get(result.task, {}) for gallery in seen]
        parts = [_task(one, own) for one, own in zip(pair, pictures, strict=False)]
        if any(parts):
            body = "".join(f"<div>{part}</div>" for part in parts)
            sections.append(section(result.task, str(result.provenance.data), _side_by_side(body)))
    sections.append(section("Evidence", "", _evidence(reports)))
    models = " and ".join(dict.fromkeys(r.provenance.model for one in reports for r in one.results))
    notes = [note for one in reports for note in footnotes(one)]
    html = page(f"Evaluation of {models}", "Measured by vlm.", sections, notes)
    target = epath.Path(path)
    partial = target.parent / f"{target.name}.partial"
    partial.write_text(html)
    partial.replace(target)


def _side_by_side(body: str) -> str:
    style = "display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px"
    return f'<div style="{style}">{body}</div>'


def _task(result: Result, gallery: Gallery) -> str:
    """The diagrams of one task, as far as its samples allow."""
    samples = result.samples
    if samples is not None and "found" in samples:
        return _retrieved(samples, gallery)
    if samples is None or "predicted" not in samples:
        return ""
    right = samples["rank"] == 0
    return (
        '<div class="charts">'
        f"{_card('Reliability', _reliability(samples['confidence'], right))}"
        f"{_card('Confusion', _confusion(samples['predicted'], samples['target']))}"
        f"{_card('Surest right', _examples(samples, right, gallery))}"
        f"{_card('Surest wrong', _examples(samples, ~right, gallery))}"
        "</div>"
    )


WAYS = (("image_to_text", "Texts of images"), ("text_to_image", "Images of texts"))


def _retrieved(samples: dict[str, np.ndarray], gallery: Gallery) -> str:
    """What was found: the surest right answers, and those furthest off with their rank."""
    cards = []
    for way, title in WAYS:
        for kind, rows in zip(("best", "worst"), best_and_worst(samples, way), strict=True):
            figures = [
                _figure(gallery[i], f"(rank {samples['rank'][i] + 1:,})" if kind == "worst" else "")
                for i in rows
                if i in gallery
            ]
            if figures:
                cards.append(
                    _card(f"{title}: {kind}", f'<div class="strip">{"".join(figures)}</div>')
                )
    return f'<div class="charts">{"".join(cards)}</div>' if cards else ""


def _card(title: str, body: str) -> str:
    return f'<div class="chart card"><h3>{escape(title)}</h3>{body}</div>'


def _reliability(confidence: np.ndarray, right: np.ndarray) -> str:
    """Accuracy by confidence: a calibrated model lies on the diagonal."""
    rows, most = reliability(confidence, right), 1
    most = max((count for *_, count in rows), default=1)
    bars = []
    for sure, share, count in rows:
        x, width = SIDE * sure, max(3.0, 12 * (count / most) ** 0.5)
        bars.append(
            f'<rect x="{x - width / 2:.1f}" y="{SIDE * (1 - share):.1f}" width="{width:.1f}" '
            f'height="{SIDE * share:.1f}" fill="currentColor" opacity=".55">'
            f"<title>{count:,} images at {sure:.0%}: {share:.0%} right</title></rect>"
        )
    ticks = "".join(
        f'<text class="tick" x="{SIDE * t:.0f}" y="{SIDE + 16}" text-anchor="middle">{t:.0%}</text>'
        f'<text class="tick" x="-6" y="{SIDE * (1 - t) + 4:.0f}" text-anchor="end">{t:.0%}</text>'
        for t in (0, 0.5, 1)
    )
    frame = f'<path class="rule" d="M0 {SIDE}H{SIDE}V0" fill="none"/>'
    line = f'<path class="rule" d="M0 {SIDE}L{SIDE} 0" stroke-dasharray="4 4" fill="none"/>'
    box = f"-44 -10 {SIDE + 60} {SIDE + 48}"
    label = (
        f'<text class="tick" x="{SIDE / 2}" y="{SIDE + 32}" text-anchor="middle">confidence</text>'
    )
    return (
        f'<svg class="c0" viewBox="{box}" role="img" aria-label="accuracy by confidence" '
        f'style="max-width:340px">{frame}{"".join(bars)}{line}{ticks}{label}</svg>'
    )


def _confusion(predicted: np.ndarray, target: np.ndarray) -> str:
    """Counts by right and predicted class, of the classes with the most errors."""
    classes = int(max(predicted.max(), target.max())) + 1
    if classes > 2000:
        return '<p class="soft">Too many classes for a matrix.</p>'
    counts = confusion(predicted, target, classes)
    errors = counts.sum(1) - np.diag(counts)
    shown = np.sort(np.argsort(-errors, kind="stable")[:CLASSES])
    part = counts[np.ix_(shown, shown)]
    cell = SIDE / len(shown)
    cells = []
    for i, row in enumerate(part):
        total = max(int(counts[shown[i]].sum()), 1)
        for j, count in enumerate(row):
            if count:
                cells.append(
                    f'<rect x="{cell * j:.1f}" y="{cell * i:.1f}" width="{cell:.1f}" '
                    f'height="{cell:.1f}" fill="currentColor" opacity="{count / total:.2f}">'
                    f"<title>class {shown[i]} called {shown[j]}: {count:,}</title></rect>"
                )
    note = "" if len(shown) == classes else f" (the {len(shown)} of {classes:,} with most errors)"
    return (
        f'<svg class="c1" viewBox="-4 -4 {SIDE + 8} {SIDE + 8}" role="img" '
        f'aria-label="confusion matrix" style="max-width:340px">'
        f'<path class="rule" d="M0 0H{SIDE}V{SIDE}H0Z" fill="none"/>{"".join(cells)}</svg>'
        f'<p class="soft">Right class down, predicted class across{note}.</p>'
    )


def _sets_apart(c: Comparison, of_a: Gallery, of_b: Gallery) -> str:
    """Pictures of queries that only one of the two gets right, and what the other calls them."""
    parts = []
    sides = (("Only B is right", c.gained, of_a), ("Only A is right", c.lost, of_b))
    for title, queries, gallery in sides:
        shown = [_figure(gallery[q], "") for q in queries if q in gallery]
        if shown:
            parts.append(_card(f"{c.task}: {title}", f'<div class="strip">{"".join(shown)}</div>'))
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def _figure(entry: tuple[str, str, str], score: str) -> str:
    source, right, called = entry
    said = right if right == called else f"{right}, not {called}"
    return (
        f'<figure><img src="{source}" alt="{escape(right)}" title="{escape(said)}">'
        f"<figcaption>{escape(said)} {score}</figcaption></figure>"
    )


def _examples(samples: dict[str, np.ndarray], kept: np.ndarray, gallery: Gallery) -> str:
    """The queries of these that the model is surest of."""
    at = np.flatnonzero(kept)
    at = at[np.argsort(-samples["confidence"][at], kind="stable")][:SHOWN]
    if not len(at):
        return '<p class="soft">None.</p>'
    if all(int(samples["query"][i]) in gallery for i in at):
        figures = (
            _figure(gallery[int(samples["query"][i])], f"{samples['confidence'][i]:.0%}")
            for i in at
        )
        return f'<div class="strip">{"".join(figures)}</div>'
    rows = "".join(
        f"<tr><td>{samples['query'][i]}</td><td>{samples['target'][i]}</td>"
        f"<td>{samples['predicted'][i]}</td>"
        f'<td class="right">{samples["confidence"][i]:.1%}</td></tr>'
        for i in at
    )
    heads = "<th>image</th><th>class</th><th>called</th><th>score</th>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _compared(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for c in comparisons:
        d = c.difference
        gained, lost = (", ".join(map(str, part)) or "none" for part in (c.gained, c.lost))
        cells = (
            c.task, f"{c.a:.1%}", f"{c.b:.1%}",
            f"{d.value:+.1%} [{d.low:+.1%}, {d.high:+.1%}]", f"{c.only_a:,} / {c.only_b:,}",
            f"{c.p_value:.2g}", f"{c.smallest:.1%}", c.verdict, gained, lost,
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = (
        "Task", "A", "B", "B - A, 95%", "only A / B", "McNemar p", "smallest shown", "verdict",
        "only B right", "only A right",
    )  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="card scroll">{table}</div>' if rows else ""


def _evidence(reports: Sequence[Report]) -> str:
    blocks = []
    for report in reports:
        for result in report.results:
            facts = {"model": result.provenance.model, **result.provenance.evidence}
            facts["templates"] = " | ".join(result.provenance.templates)
            cells = "".join(
                f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
                for name, value in facts.items()
            )
            title = escape(f"{result.provenance.model}, {result.task}")
            blocks.append(
                f'<details class="card"><summary>{title}</summary><dl>{cells}</dl></details>'
            )
    return "".join(blocks)
