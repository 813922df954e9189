"""Coverage in simulation: an interval called 95% holds the truth 93 to 97% of the time."""

import numpy as np
import pytest
from scipy.stats import norm

from vlm.errors import DataError
from vlm.evaluate.intervals import (
    bootstrap_mean,
    clustered_proportion,
    mean_of_proportions,
    proportion,
)

RUNS = 4000
# 3.3 standard errors of a coverage of 95% measured in so many runs, about 1.1%: what is asserted
# beyond 93 to 97% would be luck.
LOW, HIGH = 0.93, 0.97


def coverage(metrics, truth):
    return np.mean([metric.low <= truth <= metric.high for metric in metrics])


@pytest.mark.parametrize(("p", "n"), [(0.5, 100), (0.9, 300), (0.37, 1000), (0.97, 400)])
def test_independent(p, n):
    hits = np.random.default_rng(0).binomial(n, p, RUNS)
    assert LOW <= coverage([proportion(int(h), n) for h in hits], p) <= HIGH


@pytest.mark.parametrize(
    ("p", "clusters", "within"), [(0.6, 200, 0.8), (0.3, 400, 1.5), (0.85, 150, 0.5)]
)
def test_clustered(p, clusters, within):
    """Five captions of an image share its difficulty: as if independent they cover too little."""
    rng = np.random.default_rng(1)
    threshold = norm.ppf(p) * np.sqrt(1 + within**2)
    groups = np.repeat(np.arange(clusters), 5)
    shared = within * rng.standard_normal((RUNS, clusters, 1))
    hits = (shared + rng.standard_normal((RUNS, clusters, 5)) < threshold).reshape(RUNS, -1)
    assert LOW <= coverage([clustered_proportion(h, groups) for h in hits], p) <= HIGH
    naive = coverage([proportion(int(h.sum()), len(h)) for h in hits], p)
    assert naive < LOW


def test_mean_per_class():
    rng = np.random.default_rng(2)
    each, n = rng.uniform(0.4, 0.98, 20), rng.integers(10, 60, 20)
    found = [mean_of_proportions(rng.binomial(n, each), n) for _ in range(RUNS)]
    assert LOW <= coverage(found, each.mean()) <= HIGH


def test_bootstrap_of_clusters():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(120), 4)
    found = []
    for seed in range(250):  # 2.5 standard errors are 3.5%
        values = rng.standard_normal(120)[groups] + rng.standard_normal(480)
        found.append(bootstrap_mean(values, 300, seed, groups))
    assert 0.91 <= coverage(found, 0) <= 0.985


@pytest.mark.untyped
def test_worked_values():
    hits = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    # Clusters of two equal trials are worth four trials, apart from the quantile.
    metric = clustered_proportion(hits, np.repeat(np.arange(4), 2))
    assert metric.value == 0.5
    assert metric.n == 8
    half = (metric.high - metric.low) / 2
    t, worth = 3.182446, 3.0  # of three degrees of freedom; variance 4 / 3 * 4 / 64 = 1 / 12
    assert half == pytest.approx(
        t / (1 + t**2 / worth) * np.sqrt(0.25 / worth + t**2 / 4 / 9), abs=1e-4
    )
    same = clustered_proportion(hits, np.arange(8))
    assert same == proportion(4, 8)
    sure = clustered_proportion(np.ones(50, bool), np.repeat(np.arange(10), 5))
    assert sure.low == proportion(10, 10).low  # not that of fifty
    with pytest.raises(DataError, match="8 trials and 3 clusters"):
        clustered_proportion(hits, np.arange(3))
    with pytest.raises(DataError, match="no proportions"):
        mean_of_proportions(np.zeros(2), np.zeros(2))
