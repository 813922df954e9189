"""Paired tests, and what cannot be compared."""

import dataclasses

import numpy as np
import pytest

from vlm.errors import ConfigError
from vlm.evaluation.comparison import as_json, compare, mcnemar, smallest_difference
from vlm.evaluation.intervals import proportion
from vlm.evaluation.runner import Result, provenance
from vlm.evaluation.tasks import DataInfo


def result(right, cluster=None, data="d", **more):
    n = len(right)
    samples = {
        "query": np.arange(n),
        "rank": np.where(right, 0, 3),
        "cluster": np.arange(n) if cluster is None else cluster,
        **more,
    }
    evidence = {"data_hash": data, "texts_hash": "t"}
    origin = provenance("m", DataInfo("x"), evidence=evidence)
    metrics = {"top1": proportion(int(np.sum(right)), n)}
    return Result("task", metrics, origin, "zeroshot_classification", samples)


def test_mcnemar_worked():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)


def test_a_difference_and_what_sets_them_apart():
    rng = np.random.default_rng(0)
    a = rng.random(1000) < 0.5
    b = a | (rng.random(1000) < 0.1)
    (found,) = compare(result(a), result(b))
    assert found.difference.value == pytest.approx(b.mean() - a.mean())
    assert (found.only_a, found.only_b) == (0, (b & ~a).sum())
    assert found.gained == tuple(np.flatnonzero(b & ~a)[:8])
    assert found.p_value < 1e-6
    assert found.verdict == "B is better"
    (back,) = compare(result(b), result(a))
    assert back.verdict == "A is better"
    (same,) = compare(result(a), result(a))
    assert same.p_value == 1
    assert "no difference shown" in same.verdict
    assert '"verdict": "B is better"' in as_json([found])


def test_the_smallest_difference_is_shown_in_four_of_five_trials():
    rng = np.random.default_rng(1)
    shown = []
    probe = rng.choice([-1.0, 0, 1], 500, p=[0.1, 0.8, 0.1])
    least = smallest_difference(probe, np.arange(500))
    p = np.array([0.1 - least / 2, 0.8, 0.1 + least / 2])
    for _ in range(2000):
        d = rng.choice([-1.0, 0, 1], 500, p=p)
        shown.append(d.mean() > 1.96 * d.std() / np.sqrt(500))
    assert np.mean(shown) == pytest.approx(0.8, abs=0.05)


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(100), 5)
    a, b = (rng.random(100) < 0.5)[groups], (rng.random(100) < 0.6)[groups]
    (wide,) = compare(result(a, groups), result(b, groups))
    (narrow,) = compare(result(a), result(b))
    width = [m.difference.high - m.difference.low for m in (wide, narrow)]
    assert width[0] > 1.8 * width[1]
    assert wide.smallest > 1.8 * narrow.smallest


def test_each_direction_of_retrieval():
    ways = np.array(["image_to_text"] * 3 + ["text_to_image"] * 5)
    a = result(np.ones(8, bool), direction=ways)
    b = result(np.arange(8) > 2, direction=ways)
    first, second = compare(a, b)
    assert first.task == "task, image_to_text"
    assert (first.b, second.b) == (0, 1)


def test_what_cannot_be_compared():
    one = result(np.ones(5, bool))
    with pytest.raises(ConfigError, match="measured on different data"):
        compare(one, result(np.ones(5, bool), data="other"))
    with pytest.raises(ConfigError, match="has no samples"):
        compare(one, dataclasses.replace(one, samples=None))
    with pytest.raises(ConfigError, match="has different queries"):
        compare(one, result(np.ones(6, bool)))
