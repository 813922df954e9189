"""Charts as inline SVG; the style sheet of the page sets their colours."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from vlm._html import render
from vlm.evaluation.classification import confusion, reliability
from vlm.evaluation.intervals import Metric

WIDTH, HEIGHT = 560, 280  # of a line chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 56, 96, 14, 42  # margins; the right one holds the line names
LABEL_GAP = 15  # least distance between two names
MAX_POINTS = 400  # per line
TICKS = 6

SIDE = 260  # of square charts
MAX_CLASSES = 30  # in a confusion matrix
NAME, MIN_CELL, MAX_CELL = 22, 22, 56  # letters of a name, and lengths of a cell, if it has names
TOO_MANY_CLASSES = 2000  # to count all confusions

BAR, BAR_HEIGHT, BAR_NAMES = 420, 26, 110  # length, row height and label width of interval charts


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Non-finite values break the line. `low` and `high`, if given, are drawn as a band.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    markers: bool = False  # a dot at every point, with its value on hover
    faint: bool = False  # in the background and unnamed, such as unsmoothed values
    color: int = 0  # c0, c1, ... of the style sheet

    @classmethod
    def of_metrics(cls, name: str, x: Sequence[float], y: Sequence[Metric], color: int) -> "Line":
        """Make a line of metrics with their intervals as its band."""
        low, high = [m.low for m in y], [m.high for m in y]
        return cls(name, x, [m.value for m in y], low, high, markers=True, color=color)


def curve(name: str, x: Sequence[float], y: Sequence[float]) -> list[Line]:
    """Make the lines of a noisy curve: with over 20 points, its moving average in front."""
    long = len(y) > 20
    return [Line(name, x, y, faint=long), *([Line(name, x, smooth(y))] if long else [])]


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str = "step",
    y_format: Callable[[float], str] | None = None,
    from_zero: bool = False,
    standalone: bool = False,
) -> str:
    """Draw lines as `<svg>`; an empty string if no line has a finite point.

    The x axis starts at 0; `from_zero` starts the y axis there too. `standalone` adds the styles
    that the chart needs outside of a page, such as in a notebook.
    """
    y_format = y_format or short
    lines = [_thinned(line) for line in lines]
    points = [
        (x, v)
        for line in lines
        for ys in (line.y, line.low or (), line.high or ())
        for x, v in zip(line.x, ys, strict=False)
        if math.isfinite(x) and math.isfinite(v)
    ]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    x_low, x_high = min(0.0, *xs), max(xs)
    y_ticks = ticks(min(ys) if not from_zero else min(0.0, *ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return round(LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(line: Line, ys: Sequence[float], at: Sequence[int]) -> str:
        return " ".join(f"{px(line.x[i])},{py(ys[i])}" for i in at)

    drawn, names, floor = [], [], -math.inf
    for line in lines:
        runs = _finite_runs(line)
        bands = [
            f"{path(line, line.high, run)} {path(line, line.low, run[::-1])}"
            for run in runs
            if line.low and line.high
        ]
        dots = [
            (px(line.x[i]), py(line.y[i]), f"{x_label} {line.x[i]:,.10g}: {y_format(line.y[i])}")
            for run in runs
            for i in run
            if line.markers
        ]
        drawn.append((line, bands, [path(line, line.y, run) for run in runs], dots))
        if runs and not line.faint:
            last = line.y[runs[-1][-1]]
            names.append((py(last), line, y_format(last)))
    labels = []
    for y, line, value in sorted(names, key=lambda entry: entry[0]):  # apart from each other
        floor = max(y, floor + 2 * LABEL_GAP)
        labels.append((round(floor + 1, 1), line, value))
    ceiling = HEIGHT - LABEL_GAP - 4  # of the last name, whose value is below it
    for i, (y, line, value) in reversed(list(enumerate(labels))):
        labels[i] = (min(y, ceiling), line, value)
        ceiling = labels[i][0] - 2 * LABEL_GAP
    return render(
        "evaluation/line_chart.svg",
        title=title,
        x_label=x_label,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
        label_gap=LABEL_GAP,
        y_ticks=[(py(y), y_format(y)) for y in y_ticks],
        x_ticks=[(px(x), short(x)) for x in ticks(x_low, x_high) if x <= x_high],
        lines=drawn,
        labels=labels,
        standalone=standalone,
    )


def interval_chart(values: Mapping[str, Metric], baseline: float, highlighted: str) -> str:
    """Draw a row per name: the interval as a bar, the value as a dot, `baseline` as a dashed line.

    Values are from 0 to 1.
    """

    def px(value: float) -> float:
        return round(BAR_NAMES + BAR * value, 1)

    return render(
        "evaluation/interval_chart.svg",
        values=values,
        px=px,
        baseline=baseline,
        highlighted=highlighted,
        row=BAR_HEIGHT,
        left=BAR_NAMES,
        width=BAR_NAMES + BAR + 30,
    )


def reliability_chart(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> str:
    """Draw accuracy by confidence; a calibrated model is on the diagonal.

    The width of a bar grows with the number of its images.
    """
    bins = reliability(confidence, right)
    most = max((count for *_, count in bins), default=1)
    bars = [(*b, max(3.0, 12 * (b[-1] / most) ** 0.5)) for b in bins]
    return render("evaluation/reliability.svg", bars=bars, side=SIDE)


def confusion_chart(
    predicted: Int[np.ndarray, " n"],
    target: Int[np.ndarray, " n"],
    names: Sequence[str] = (),
    most: int = MAX_CLASSES,
) -> str:
    """Draw the confusion matrix of the `most` classes with the most errors.

    With the names of all classes, rows and columns are named and cells have their counts.
    """
    classes = len(names) or int(max(predicted.max(), target.max())) + 1
    if classes > TOO_MANY_CLASSES:
        return render("evaluation/confusion.svg", shown=[], classes=classes)
    counts = confusion(predicted, target, classes)
    wrong = counts - np.diag(np.diag(counts))
    errors = wrong.sum(1)
    if names:  # the classes of the most frequent confusions, so that these are in the matrix
        errors = np.maximum(wrong.max(1), wrong.max(0)) * len(target) + errors + wrong.sum(0)
    shown = np.sort(np.argsort(-errors, kind="stable")[:most])
    cells = [
        (row, column, int(count), float(count / counts[shown[row]].sum()))
        for (row, column), count in np.ndenumerate(counts[np.ix_(shown, shown)])
        if count
    ]
    if names:
        return _named_matrix([names[int(i)] for i in shown], cells, classes - len(shown))
    return render(
        "evaluation/confusion.svg",
        cells=cells,
        shown=shown.tolist(),
        classes=classes,
        side=SIDE,
        cell=SIDE / len(shown),
        width=max(340, min(680, 4 * len(shown))),
    )


def _named_matrix(
    names: Sequence[str], cells: Sequence[tuple[int, int, int, float]], hidden: int
) -> str:
    """Draw a confusion matrix with class names; `hidden` classes are not in it."""
    half = NAME // 2 - 1
    short_names = [n if len(n) <= NAME else f"{n[:half]}...{n[-half + 1 :]}" for n in names]
    margin = 20 + 7 * max(map(len, short_names))
    cell = min(MAX_CELL, max(MIN_CELL, SIDE / len(names)))
    return render(
        "evaluation/confusion_names.svg",
        names=list(zip(short_names, names, strict=True)),
        cells=cells,
        hidden=hidden,
        margin=margin,
        cell=cell,
        side=cell * len(names),
        width=round(margin + cell * len(names) + margin / 2),
        height=round(margin + cell * len(names) + 2),
    )


def ticks(low: float, high: float) -> list[float]:
    """Compute about `TICKS` round numbers, from one at or below `low` to one at or above `high`.

    Steps are 1, 2 or 5 times a power of ten (Heckbert, "Nice numbers for graph labels", 1990).
    """
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        # A constant, up to rounding, is drawn in the middle.
        room = abs(low) * 0.5 or 1.0
        low, high = low - room, low + room
    step = (high - low) / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """Format a number in few characters: 12.5k, 0.05, 3e-05."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    """Format a fraction as a percentage of three significant digits."""
    return f"{100 * value:.3g}%"


def smooth(values: Sequence[float]) -> list[float]:
    """Compute an exponential moving average over about 2% of the values, without start-up bias."""
    decay = 1 - 1 / max(1.0, 0.02 * len(values))
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight if weight else math.nan)
    return result


def _finite_runs(line: Line) -> list[list[int]]:
    """Return the indices of the points, split at non-finite values."""
    runs: list[list[int]] = [[]]
    for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(line: Line) -> Line:
    """Return the line with at most about `MAX_POINTS` points, including the last one."""
    step = math.ceil(len(line.x) / MAX_POINTS)
    if step <= 1:
        return line
    kept = sorted({*range(0, len(line.x), step), len(line.x) - 1})
    columns = {name: getattr(line, name) for name in ("x", "y", "low", "high")}
    return dataclasses.replace(
        line, **{name: v and [v[i] for i in kept] for name, v in columns.items()}
    )
