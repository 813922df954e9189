"""Accuracy against shots: the curve, its picture, and what it refuses."""

import numpy as np
import pytest

from vlm.errors import DataError
from vlm.evaluation.few_shot_curve import accuracy_by_shots


def test_the_curve_rises_from_zero_shot_and_is_drawn():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 12))
    target = rng.integers(0, 4, 200)
    z = centres[target] + 0.9 * rng.standard_normal((200, 12))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    wrong = centres + 1.2 * rng.standard_normal((4, 12))
    prior = (30 * wrong / np.linalg.norm(wrong, axis=1, keepdims=True)).T.astype(np.float32)
    curve = accuracy_by_shots(z, target, prior, 30.0, ("anchored", "mean"), (1, 16), rounds=2)
    anchored = curve.points["anchored"]
    assert anchored[16].value > curve.zero_shot.value
    assert anchored[1].value > curve.zero_shot.value - 0.05
    assert anchored[1].n == 200
    picture = curve.svg()
    assert picture.startswith("<svg")
    for name in ("zero-shot", "anchored", "mean"):
        assert name in picture
    with pytest.raises(DataError, match="class 4 has no training image"):
        accuracy_by_shots(z, target, np.pad(prior, ((0, 0), (0, 1))), 30.0)


def test_copies_stay_in_one_half():
    """A head that remembers images is right only about those of which it has a copy."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((40, 64)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    z, groups, target = np.repeat(z, 2, 0), np.repeat(np.arange(40), 2), rng.integers(0, 4, 40)
    target, prior = np.repeat(target, 2), np.zeros((64, 4), np.float32)
    values = [
        accuracy_by_shots(z, target, prior, 30.0, ("cache",), (16,), groups=g, rounds=1).points
        for g in (None, groups)
    ]
    leaked, honest = (points["cache"][16].value for points in values)
    assert leaked > honest + 0.1
