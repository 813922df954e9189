"""The search for the largest batch finds it, in few tries."""

import bisect
import dataclasses
import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small import experiment

from vlm.errors import ConfigError
from vlm.planning import plan
from vlm.planning.batch import search
from vlm.planning.report import show


@settings(deadline=None, max_examples=50)
@given(
    fixed=st.floats(0, 0.9),
    slope=st.floats(1e-4, 0.2),
    bend=st.floats(0, 1e-5),
    start=st.integers(1, 10_000),
)
def test_the_largest_that_fits(fixed, slope, bend, start):
    """Memory that grows by a line and a little more, of which 1 is allowed."""

    def peak(n):
        used = fixed + slope * n + bend * n**2
        return used, used <= 1

    found, tried = search(peak, start, 1.0, calls=30)
    largest = bisect.bisect_left(range(1, 20_000), 1, key=lambda n: not peak(n)[1])
    if largest == 0:
        assert found is None
    else:
        assert peak(found)[1]
        assert found >= 0.97 * largest - 1
        assert not peak(largest + 1)[1]
    assert len(tried) <= 30


def test_a_line_takes_few_compilations():
    def peak(n):
        return 0.2 + n / 1000, n <= 800

    found, tried = search(peak, 64, 1.0, calls=5)
    assert 780 <= found <= 800
    assert len(tried) <= 4


def test_a_refusal_that_names_no_size():
    def peak(n):
        return (0.5, True) if n <= 5 else (math.inf, False)

    assert search(peak, 100, 1.0, calls=20)[0] == 5


def test_nothing_fits():
    found, tried = search(lambda n: (2.0 + n, False), 64, 1.0, calls=20)
    assert found is None
    assert min(n for n, _, _ in tried) == 1


def test_the_largest_batch_of_a_gpu_is_estimated():
    made = plan(experiment(512), "l4:1", largest=True)
    assert made.largest is not None
    assert made.largest.basis == made.to_dict()["largest_batch"]["basis"] == "analytic"
    assert made.largest.exact
    assert 0.97 * made.memory.limit < made.largest.peak <= made.memory.limit
    short = dataclasses.replace(made, largest=dataclasses.replace(made.largest, exact=False))
    for shown, warns in ((made, False), (short, True)):
        console = Console(file=io.StringIO(), width=120)
        show(shown, console)
        assert ("a larger one may fit" in console.file.getvalue()) == warns
    with pytest.raises(ConfigError, match="leave --largest-batch out"):
        plan(experiment(512), "cpu:1", largest=True)
