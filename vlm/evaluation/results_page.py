"""HTML pages of evaluations: one report, or two side by side with their comparison."""

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vlm._html import render
from vlm.evaluation.charts import confusion_chart, reliability_chart
from vlm.evaluation.comparison import Comparison, columns
from vlm.evaluation.results_folder import SHOWN, Gallery, best_and_worst
from vlm.evaluation.runner import Report, Result
from vlm.paths import replace_text

METRIC_NAMES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "mean_per_class_recall": "Mean recall per class",
    "calibration_error": "Calibration error",
    **{f"image_to_text_R@{k}": f"Image → text, R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_R@{k}": f"Text → image, R@{k}" for k in (1, 5, 10)},
}
DIRECTIONS = {"image_to_text": "Texts of images", "text_to_image": "Images of texts"}


def write_page(
    path: str | os.PathLike,
    report: Report,
    other: Report | None = None,
    comparisons: Sequence[Comparison] = (),
    galleries: Sequence[Mapping[str, Gallery]] = (),
) -> None:
    """Write the page of a report, or of two reports side by side with their differences.

    Args:
        path: of the page, local or remote.
        report: its results are shown by example if they have samples.
        other: another report.
        comparisons: of the two.
        galleries: for each report, pictures of some of its queries, by task.
    """
    pictures = [*galleries, {}, {}][:2]
    reports = [report] if other is None else [report, other]
    titles = ["Results"]
    if other is not None:
        titles = [
            f"{name}: {one.results[0].provenance.model}"
            for name, one in zip("AB", reports, strict=True)
        ]
    tasks = []
    for result in report.results:
        pair = [r for one in reports for r in one.results if r.task == result.task]
        shown = [gallery.get(result.task, {}) for gallery in pictures]
        parts = [_task(one, gallery) for one, gallery in zip(pair, shown, strict=False)]
        if any(parts):
            tasks.append((result.task, str(result.provenance.data), parts))
    results = [result for one in reports for result in one.results]
    html = render(
        "evaluation/results.html",
        title=f"Evaluation of {' and '.join(dict.fromkeys(r.provenance.model for r in results))}",
        lead="Measured by vlm.",
        footnotes=[note for one in reports for note in footnotes(one)],
        headings=list(columns(comparisons[0])) if comparisons else [],
        comparisons=[list(columns(c).values()) for c in comparisons],
        differences=[group for c in comparisons for group in _differences(c, pictures)],
        reports=zip(titles, map(results_table, reports), strict=True),
        tasks=tasks,
        evidence=[(f"{r.provenance.model}, {r.task}", _evidence(r)) for r in results],
    )
    replace_text(path, html)


def results_table(report: Report) -> str:
    """Render the metrics of every task with their intervals."""
    return render(
        "evaluation/results_table.html",
        results=report.results,
        metric_names=METRIC_NAMES,
        note=report.caveat,
    )


def footnotes(report: Report) -> Iterable[str]:
    """Yield a sentence for each model, device and set of library versions."""
    origins = [result.provenance for result in report.results]
    date = max((origin.date for origin in origins), default="")
    for model, device, versions in dict.fromkeys(
        (origin.model, origin.device, tuple(origin.versions.items())) for origin in origins
    ):
        listed = ", ".join(f"{name} {version}" for name, version in versions)
        yield f"Evaluated {date} with {model} on {device}: {listed}."


def _task(result: Result, gallery: Gallery) -> dict:
    """Return the diagrams and examples of one task, as far as its samples allow."""
    samples = result.samples
    if samples is not None and "found" in samples:
        groups = []
        for direction, title in DIRECTIONS.items():
            best, worst = best_and_worst(samples, direction)
            groups += _groups(f"{title}: best", dict.fromkeys(best, ""), gallery)
            ranks = {i: f"(rank {samples['rank'][i] + 1:,})" for i in worst}
            groups += _groups(f"{title}: worst", ranks, gallery)
        return {"groups": groups} if groups else {}
    if samples is None or "predicted" not in samples:
        return {}
    right = samples["rank"] == 0
    return {
        "reliability": reliability_chart(samples["confidence"], right),
        "confusion": confusion_chart(samples["predicted"], samples["target"]),
        "examples": [
            ("Most confident correct", *_examples(samples, right, gallery)),
            ("Most confident wrong", *_examples(samples, ~right, gallery)),
        ],
    }


def _differences(c: Comparison, pictures: Sequence[Mapping[str, Gallery]]) -> list[tuple]:
    """Return pictures of queries that only one of the two models gets right."""
    of_a, of_b = (gallery.get(c.task, {}) for gallery in pictures)
    return [
        *_groups(f"{c.task}: Only B is right", dict.fromkeys(c.gained, ""), of_a),
        *_groups(f"{c.task}: Only A is right", dict.fromkeys(c.lost, ""), of_b),
    ]


def _groups(title: str, notes: Mapping[int, str], gallery: Gallery) -> list[tuple]:
    """Return the title and pictures of some queries; an empty list without pictures."""
    figures = [(*gallery[i], note) for i, note in notes.items() if i in gallery]
    return [(title, figures)] if figures else []


def _examples(
    samples: dict[str, np.ndarray], kept: np.ndarray, gallery: Gallery
) -> tuple[list[tuple], list[tuple]]:
    """Return the most confident of some queries: as pictures, or as table rows without these."""
    at = np.flatnonzero(kept)
    at = at[np.argsort(-samples["confidence"][at], kind="stable")][:SHOWN]
    columns = (samples[name][at] for name in ("query", "target", "predicted", "confidence"))
    rows = [
        (query, target, predicted, f"{confidence:.1%}")
        for query, target, predicted, confidence in zip(*columns, strict=True)
    ]
    if all(int(query) in gallery for query, *_ in rows):
        notes = samples["confidence"][at]
        return [(*gallery[int(r[0])], f"{n:.0%}") for r, n in zip(rows, notes, strict=True)], []
    return [], rows


def _evidence(result: Result) -> dict[str, str]:
    origin = result.provenance
    facts = {"model": origin.model, **origin.evidence}
    return facts | {"templates": " | ".join(origin.templates)}
