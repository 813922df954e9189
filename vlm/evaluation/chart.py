"""Line charts as inline SVG: axes, labelled lines and bands, coloured by the page's style sheet."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 280  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 96, 14, 42  # margins; the right one holds the lines' names
LABEL_GAP = 15  # least distance between two names
MAX_POINTS = 400  # per line: more than the eye can tell apart at this width


@dataclass(frozen=True)
class Line:
    """A line to draw: its name, its points, and how.

    Values that are not finite break the line. `low` and `high`, if given, are drawn as a band.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    markers: bool = False  # a dot at every point, with its value on hover
    faint: bool = False  # in the background and without a name, such as unsmoothed values
    color: int = 0  # the style sheet's c0, c1, ...


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str = "step",
    y_format: Callable[[float], str] | None = None,
    from_zero: bool = False,
) -> str:
    """The `<svg>` of a chart, or an empty text if no line has a finite point.

    The horizontal axis begins at 0; the vertical one does too with `from_zero`.
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
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for y in y_ticks:
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" '
            f'y2="{py(y):.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">'
            f"{escape(y_format(y))}</text>"
        )
    for x in ticks(x_low, x_high):
        if x <= x_high:
            parts.append(
                f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                f'text-anchor="middle">{escape(short(x))}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )

    names = []
    for line in lines:
        runs = _finite_runs(line)
        if not runs:
            continue
        parts += [_band(line, run, px, py) for run in runs if line.low and line.high]
        shade = "line faint" if line.faint else "line"
        for run in runs:
            path = " ".join(f"{px(line.x[i]):.1f},{py(line.y[i]):.1f}" for i in run)
            parts.append(f'<polyline class="{shade} c{line.color}" points="{path}"/>')
        last = runs[-1][-1]
        for i in (i for run in runs for i in run if line.markers):
            value = f"{line.name} at {x_label} {line.x[i]:,.10g}: {y_format(line.y[i])}"
            parts.append(
                f'<circle class="dot c{line.color}" cx="{px(line.x[i]):.1f}" '
                f'cy="{py(line.y[i]):.1f}" r="3.2"><title>{escape(value)}</title></circle>'
            )
        if not line.faint:
            names.append((py(line.y[last]), line, y_format(line.y[last])))
    parts += _names(names)
    return "".join([*parts, "</svg>"])


def alone(svg: str) -> str:
    """A chart outside of a page, such as in a notebook: with the few rules that it needs."""
    return f'<div class="vlm-chart"><style>{_RULES}</style>{svg}</div>' if svg else ""


_RULES = (
    ".vlm-chart{max-width:640px}.vlm-chart .rule{stroke:#8884}"
    ".vlm-chart .tick,.vlm-chart .axis{fill:#888;font-size:12px}"
    ".vlm-chart .line{fill:none;stroke:currentColor;stroke-width:2.2}.vlm-chart .faint{opacity:.3}"
    ".vlm-chart .band{fill:currentColor;opacity:.14}.vlm-chart .dot{fill:currentColor}"
    ".vlm-chart .name{fill:currentColor;font-size:13px}.vlm-chart .c0{color:#3b5bdb}"
    ".vlm-chart .c1{color:#0c8599}.vlm-chart .c2{color:#e8590c}.vlm-chart .c3{color:#862e9c}"
)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers, from one at or below `low` to one at or above `high`.

    Steps are 1, 2 or 5 times a power of ten (Heckbert, "Nice numbers for graph labels", 1990).
    """
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        # A constant, but for rounding, is given room around it: it is drawn in the middle.
        room = abs(low) * 0.5 or 1.0
        low, high = low - room, low + room
    step = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 12.5k, 0.05, 3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """An exponential moving average over about `share` of the values, without a start-up bias."""
    decay = 1 - 1 / max(1.0, share * len(values))
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight if weight else math.nan)
    return result


def _band(line: Line, run: list[int], px: Callable, py: Callable) -> str:
    assert line.low is not None
    assert line.high is not None
    upper = [f"{px(line.x[i]):.1f},{py(line.high[i]):.1f}" for i in run]
    lower = [f"{px(line.x[i]):.1f},{py(line.low[i]):.1f}" for i in reversed(run)]
    return f'<polygon class="band c{line.color}" points="{" ".join(upper + lower)}"/>'


def _names(names: list[tuple[float, Line, str]]) -> list[str]:
    """The name and last value of each line at its right end, moved apart where they would meet."""
    parts, floor = [], -math.inf
    for y, line, value in sorted(names, key=lambda entry: entry[0]):
        floor = max(y, floor + 2 * LABEL_GAP)
        parts.append(
            f'<text class="name c{line.color}" x="{WIDTH - RIGHT + 9}" y="{floor + 1:.1f}">'
            f'{escape(line.name)}<tspan class="value" x="{WIDTH - RIGHT + 9}" dy="{LABEL_GAP}">'
            f"{escape(value)}</tspan></text>"
        )
    return parts


def _finite_runs(line: Line) -> list[list[int]]:
    """The indices of the line's points, cut where a value is not finite."""
    runs: list[list[int]] = [[]]
    for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(line: Line) -> Line:
    """The line with at most about `MAX_POINTS` of its points, the last one among them."""
    step = math.ceil(len(line.x) / MAX_POINTS)
    if step <= 1:
        return line
    keep = sorted({*range(0, len(line.x), step), len(line.x) - 1})

    def picked(values: Sequence[float]) -> list[float]:
        return [values[i] for i in keep]

    return dataclasses.replace(
        line,
        x=picked(line.x),
        y=picked(line.y),
        low=None if line.low is None else picked(line.low),
        high=None if line.high is None else picked(line.high),
    )
