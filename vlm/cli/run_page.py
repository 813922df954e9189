"""HTML page of training runs: one section for each, and a comparison of several."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlm._html import render
from vlm.callbacks.live import CHARTED
from vlm.cli.run_record import RunRecord
from vlm.display import clock
from vlm.evaluation.charts import Line, curve, line_chart, percent, short
from vlm.training.history import history_text

MOST = 4  # runs in a chart: as many as there are colours
FEW = 30  # points of a line that are drawn as dots, too

Format = Callable[[float], str]


# Heading of each chart, with the metrics that it shows and their format.
CHARTS: dict[str, tuple[dict[str, str], Format]] = {
    "Loss": ({"loss": "loss"}, short),
    "Throughput, pairs per second": ({"pairs_per_s": "pairs/s"}, short),
    "Model FLOPs utilization (MFU)": ({"mfu": "MFU"}, percent),
    "Waiting for data": ({"data_wait": "data wait"}, percent),
    "Peak memory, GiB": ({"memory/device": "device", "memory/host": "host"}, short),
    "Goodput": ({"goodput/compute": "goodput"}, percent),
    "Gradient norm": ({"grad_norm": "norm"}, short),
    "Learning rate": ({"learning_rate": "rate"}, short),
}
COMPARED = ("loss", "pairs_per_s", "mfu", "data_wait", "goodput/compute")
HEADINGS = ("step", "loss", "pairs/s", "MFU", "data wait", "goodput", "time", "starts", "rollbacks")


def cells(run: RunRecord) -> list[str]:
    """Return the cells of a run in a table with `HEADINGS`; what is not known is empty."""

    def last(name: str, form: Format) -> str:
        value = run.last(name)
        return "" if value is None else form(value)

    total = "" if run.total is None else f"/{run.total:,}"
    seconds = sum(run.tally.seconds.values())
    return [
        f"{run.step:,}{total}",
        last("loss", short),
        last("pairs_per_s", short),
        last("mfu", percent),
        last("data_wait", percent),
        percent(run.tally.shares()["compute"]) if seconds else "",
        clock(seconds) if seconds else "",
        str(run.tally.starts or ""),
        str(len(run.rollbacks) or ""),
    ]


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of runs, with their parent folders where two have the same."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.folder.parent.name}/{run.name}"
        for run in runs
    ]


def table(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return headings, and the cells of each run, without columns that no run has."""
    rows = [cells(run) for run in runs]
    used = [i for i in range(len(HEADINGS)) if any(row[i] for row in rows)]
    return [HEADINGS[i] for i in used], [[row[i] for i in used] for row in rows]


def page(runs: Sequence[RunRecord], now: str) -> str:
    """Return the page of runs, which fetches nothing; `now` says when it was made."""
    several, names = len(runs) > 1, labels(runs)
    note = "" if len(runs) <= MOST else f"The first {MOST} runs; name others to compare them."
    headings, rows = table(runs)
    return render(
        "cli/runs.html",
        title="Training runs" if several else names[0],
        lead=f"As of {now}.",
        runs=[
            {**_section(run), "name": name, "cells": row}
            for run, name, row in zip(runs, names, rows, strict=True)
        ],
        names=names,
        headings=headings,
        comparison=list(_comparison(runs[:MOST], names)) if several else [],
        comparison_note=note,
        differences=list(differences(runs)),
    )


def _section(run: RunRecord) -> dict[str, Any]:
    shares, seconds = run.tally.shares(), run.tally.seconds
    total = sum(seconds.values())
    values = dict(zip(HEADINGS, cells(run), strict=True))
    count = f"{run.tally.starts} start{'s' if run.tally.starts != 1 else ''}"
    tiles = [
        ("Step", f"{run.step:,}", "" if run.total is None else f"of {run.total:,}"),
        ("Loss", values["loss"], "last row of the log"),
        ("Pairs per second", values["pairs/s"], f"MFU {values['MFU']}" if values["MFU"] else ""),
        ("Goodput", values["goodput"], f"of {values['time']} over {count}"),
    ]
    return {
        "status": run.status,
        "reason": run.reason,
        "tiles": [tile for tile in tiles if tile[1]],
        "charts": list(_charts(run)),
        "time_note": f"{clock(total)} over {count}. Time between two starts is not counted.",
        "shares": [
            (name, share, f"{percent(share)}, {clock(seconds[name])}")
            for name, share in shares.items()
            if total
        ],
        "results": {name: short(value) for name, value in _results(run).items()},
        "history": history_text(run.starts),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False),
    }


def _charts(run: RunRecord) -> Iterator[tuple[str, str]]:
    for heading, (metrics, form) in CHARTS.items():
        lines: list[Line] = []
        for color, (metric, name) in enumerate(metrics.items()):
            steps, values = run.column(metric)
            if metric.startswith("memory/"):
                values = [value / 2**30 for value in values]
            if metric == "loss":
                lines += _with_dots(curve(name, steps, values))
            elif values:
                lines += _with_dots([Line(name, steps, values, color=color)])
        if chart := line_chart(lines, heading, y_format=form, from_zero=heading != "Loss"):
            yield heading, chart
    lines = [
        Line(metric.removeprefix("eval/"), *run.column(metric), markers=True, color=color)
        for color, metric in enumerate(_charted([run]))
    ]
    if chart := line_chart(lines, "Evaluations", from_zero=True):
        yield "Evaluations", chart


def _charted(runs: Sequence[RunRecord]) -> list[str]:
    """Return the metrics of evaluations to draw: the usual ones, or the first."""
    names = list(dict.fromkeys(name for run in runs for name in _evaluations(run)))
    usual = [name for name in names if name.split("/")[-1] in CHARTED]
    return (usual or names)[:MOST]


def _evaluations(run: RunRecord) -> list[str]:
    names = [name for row in run.rows for name in row if name.startswith("eval/")]
    return list(dict.fromkeys(names))


def _results(run: RunRecord) -> dict[str, float]:
    """Return the last metrics of evaluations."""
    last = {name.removeprefix("eval/"): run.last(name) for name in _evaluations(run)}
    return {name: value for name, value in last.items() if value is not None}


def _comparison(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    known = {m: (heading, form) for heading, (of, form) in CHARTS.items() for m in of}
    metrics = {m: known[m] for m in COMPARED}
    metrics |= {m: (m.removeprefix("eval/"), short) for m in _charted(runs)}
    for metric, (heading, form) in metrics.items():
        lines = [
            Line(_brief(name), *run.column(metric), color=color)
            for color, (run, name) in enumerate(zip(runs, names, strict=False))
        ]
        lines = _with_dots([line for line in lines if line.y])
        if chart := line_chart(lines, heading, y_format=form, from_zero=metric in COMPARED[1:]):
            yield heading, chart


def _with_dots(lines: Sequence[Line]) -> list[Line]:
    """Add dots to short lines, which a single point needs to be seen."""
    return [dataclasses.replace(line, markers=len(line.x) <= FEW) for line in lines]


def _brief(name: str) -> str:
    """Shorten a name to the margin of a chart."""
    return name if len(name) <= 13 else f"{name[:6]}…{name[-6:]}"


def differences(runs: Sequence[RunRecord]) -> Iterator[list[str]]:
    """Yield a row for each field in which the configs differ, with the value of each run."""
    fields = [dict(_flat(run.config)) for run in runs]
    for name in dict.fromkeys(name for own in fields for name in own):
        values = [own.get(name, "") for own in fields]
        readable = {own.get(name, "") for own in fields if own}
        if name not in ("name", "run_dir", "code") and len(readable) > 1:
            yield [name, *values]


def _flat(config: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", json.dumps(value, ensure_ascii=False)
