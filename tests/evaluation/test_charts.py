"""Charts: well-formed SVG, inside its frame, true to its values."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.evaluation.charts import HEIGHT, MAX_POINTS, WIDTH, Line, line_chart, short, smooth, ticks

SVG = "{http://www.w3.org/2000/svg}"
finite = st.floats(-1e9, 1e9).filter(lambda v: v == 0 or abs(v) > 1e-9)


@given(a=finite, b=finite)
def test_ticks_hold_the_range_in_few_even_round_steps(a, b):
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high)
    room = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert marks[0] <= low + room
    assert marks[-1] >= high - room
    assert 2 <= len(marks) <= 9
    steps = [y - x for x, y in itertools.pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


def test_worked_ticks():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(3, 1200) == [0, 500, 1000, 1500]
    for almost in (7, math.nextafter(7, 8)):  # what differs by rounding alone is constant too
        assert ticks(7, almost)[0] < 7 < ticks(7, almost)[-1]


@settings(deadline=None, max_examples=40)  # the first chart loads the template engine
@given(st.lists(st.one_of(finite, st.just(math.nan), st.just(math.inf)), max_size=30))
def test_any_values_give_a_picture_inside_its_frame_or_nothing(values):
    chart = line_chart([Line("loss", range(len(values)), values, markers=True)], "loss")
    if not any(map(math.isfinite, values)):
        assert chart == ""
        return
    root = ET.fromstring(chart)
    points = [
        tuple(map(float, point.split(",")))
        for line in root.iter(f"{SVG}polyline")
        for point in line.get("points").split()
    ]
    assert len(points) == sum(map(math.isfinite, values)) == len(list(root.iter(f"{SVG}circle")))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    order = [v for v in values if math.isfinite(v)]  # a larger value is never drawn lower
    for (_, y), (_, other), v, w in zip(points, points[1:], order, order[1:], strict=False):
        assert (y <= other + 0.11) if v >= w else (y >= other - 0.11)


def test_a_value_that_is_not_finite_breaks_the_line():
    chart = line_chart([Line("loss", range(5), [1, 2, math.nan, 3, 4])], "loss")
    assert chart.count("<polyline") == 2


def test_long_lines_are_thinned_and_keep_their_end():
    n = 10_001
    chart = line_chart([Line("loss", range(n), [i / n for i in range(n)])], "loss")
    points = re.search(r'<polyline[^>]*points="([^"]*)"', chart).group(1).split()
    assert len(points) <= MAX_POINTS + 1
    assert float(points[-1].split(",")[0]) == pytest.approx(WIDTH - 96)


def test_names_are_escaped_and_kept_apart():
    lines = [Line(f"<{i}>", [0, 1], [0.5, 0.5 + i / 1000], color=i) for i in range(3)]
    root = ET.fromstring(line_chart(lines, 'a "title" & more'))
    names = [t for t in root.iter(f"{SVG}text") if (t.get("class") or "").startswith("name")]
    heights = sorted(float(t.get("y")) for t in names)
    assert all(b - a >= 29 for a, b in itertools.pairwise(heights))
    assert {t.text for t in names} == {"<0>", "<1>", "<2>"}
    assert root.get("aria-label") == 'a "title" & more'


def test_bands_hold_their_line():
    chart = line_chart([Line("top-1", [1, 2], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])], "accuracy")
    polygon = ET.fromstring(chart).find(f"{SVG}polygon").get("points").split()
    assert len(polygon) == 4


def test_smoothing_keeps_a_constant_and_skips_what_is_not_finite():
    assert smooth([3.0] * 200) == pytest.approx([3.0] * 200)
    values = [0.0] * 500 + [math.nan] + [1.0] * 500
    result = smooth(values)
    assert result[500] == result[499] == 0
    assert result[-1] == pytest.approx(1, abs=1e-6)
    assert math.isnan(smooth([math.nan])[0])


def test_short_numbers():
    written = [short(v) for v in (0, 1234, 12_500, 3e6, 0.05, 3e-5)]
    assert written == ["0", "1,234", "12.5k", "3M", "0.05", "3e-05"]
