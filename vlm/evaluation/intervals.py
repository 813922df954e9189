"""Confidence intervals at 95%, of proportions and means, also of clustered trials.

`python tests/evaluation/coverage.py` measures their coverage.

Five captions of one image are not five independent trials. If a metric knows the clusters, its
interval is that of the equivalent number of independent trials.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Num

from vlm.errors import ConfigError, DataError

Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution
MEASURED = 200  # queries, from which on coverage is measured in tests/evaluation/coverage.py
GROUPS = 100  # most groups of a jackknife
FEW = 8  # hits or misses, for which Wilson's interval alone covers as little as 84%


@dataclass(frozen=True)
class Metric:
    """A measured value, its 95% confidence interval, and the number of queries."""

    value: float
    low: float
    high: float
    n: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.n:,}"


def caveat(metrics: Iterable[Metric]) -> str:
    """Return a sentence for tables if coverage is not known to be 93 to 97%, else an empty one."""
    if all(metric.n >= MEASURED for metric in metrics):
        return ""
    return (
        f"Intervals of fewer than {MEASURED} queries are approximate, except those of plain "
        "proportions, which cover in at least 93 of 100 samples from 20 queries on."
    )


def hit_rate(ranks: Int[np.ndarray, " n"], k: int, groups: np.ndarray | None = None) -> Metric:
    """Compute the fraction of ranks below k; `groups` are clusters.

    Raises:
        DataError: no ranks.
        ConfigError: a k below 1.
    """
    if k < 1:
        raise ConfigError(f"k is {k}: the first k answers are counted from k = 1")
    hits = np.asarray(ranks) < k
    if groups is not None:
        return clustered_proportion(hits, groups)
    return proportion(int(hits.sum()), len(hits))


def proportion(hits: int, n: int) -> Metric:
    """Compute the proportion of `hits` in `n` independent trials; see `interval`.

    It covers at least 92.5% at every rate from n = 20 on, and at most 97.5% if ten or more hits and
    misses are expected.

    Raises:
        DataError: no trials.

    Example:
        >>> print(vlm.evaluation.proportion(9, 10))
        90.0% [55.5%, 99.7%] of 10
    """
    if n < 1:
        raise DataError(
            "a proportion of zero trials is undefined: evaluate on at least one example"
        )
    return interval(hits / n, n, Z95, n)


def clustered_proportion(hits: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"]) -> Metric:
    """Compute the proportion of hits in clustered trials, with a Wilson interval.

    The variance is that between clusters. The interval is of the number of independent trials that
    have this variance, at most n, with the quantile of Student's t for the number of clusters (Korn
    and Graubard, 1998, Survey Methodology 24:193-201; Dean and Pagano, 2015,
    doi:10.1093/jssam/smv024). If all trials agree, a cluster counts as one trial, and nearly so if
    the misses (or hits) are in few clusters.

    Args:
        hits: of each trial.
        groups: the cluster of each trial.

    Raises:
        DataError: no trials, or not one group per trial.
    """
    hits = np.asarray(hits, np.float64)
    _, group = np.unique(groups, return_inverse=True)
    n = len(hits)
    if not n or group.shape != hits.shape:
        raise DataError(f"{n} trials and {len(group)} clusters: give one for each, at least one")
    count = int(group.max()) + 1
    if count == n:
        return proportion(int(hits.sum()), n)
    p = float(hits.mean())
    if count == 1 or p in (0.0, 1.0):
        return interval(p, count, Z95, n)
    variance, freedom = between(hits - p, group)
    # If few clusters differ from the rest, they are weak evidence about the others.
    misses = np.bincount(group, 1 - hits if p > 0.5 else hits)
    worth = 1 / (max(variance / (p * (1 - p)), 1 / n) + 1 / (count * (misses > 0).sum() ** 2))
    return interval(p, worth, student(freedom), n)


def mean_of_proportions(hits: Num[np.ndarray, " m"], n: Num[np.ndarray, " m"]) -> Metric:
    """Compute the mean of m independent proportions of equal weight.

    The interval is Wilson's for the number of trials that have the variance of that mean. Each
    variance is taken at a proportion shrunk to the middle (Agresti and Coull, 1998), as a class
    with only hits is still uncertain.

    Args:
        hits: of each proportion.
        n: its trials; those without any are ignored.

    Raises:
        DataError: no trials.
    """
    hits, n = np.asarray(hits, np.float64), np.asarray(n, np.float64)
    hits, n = hits[n > 0], n[n > 0]
    if not len(n):
        raise DataError("a mean of no proportions is undefined: evaluate on at least one example")
    each, drawn = hits / n, (hits + 0.5) / (n + 1)
    variance = float((drawn * (1 - drawn) / n).sum()) / len(n) ** 2
    p, centre = float(each.mean()), float(drawn.mean())
    return interval(p, centre * (1 - centre) / variance, Z95, int(n.sum()))


def mean(values: Num[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None = None) -> Metric:
    """Compute the mean of `values`, with Student's interval; `groups` are clusters.

    For means that are not proportions, such as mean reciprocal rank. The variance is that of the
    jackknife over clusters (MacKinnon and White, 1985, doi:10.1016/0304-4076(85)90158-7).

    Raises:
        DataError: non-finite values, or fewer than two clusters.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise DataError("a mean takes a list of finite numbers, and at least one")
    _, group = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    n, mean_value = len(values), float(values.mean())
    if group.max() == 0:
        raise DataError("one cluster of values has no interval: give at least two")
    variance, freedom = between(values - mean_value, group)
    half = student(freedom) * math.sqrt(variance)
    return Metric(mean_value, mean_value - half, mean_value + half, n)


def paired_difference(
    difference: Num[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None = None
) -> Metric:
    """Compute the mean of differences of outcomes (-1, 0 or 1); `groups` are clusters.

    The interval is that of `mean` with one more pair of either sign (Bonett and Price, 2012,
    doi:10.3102/1076998611411915): equal answers to all queries do not show that two models are
    equal.

    Raises:
        DataError: no differences.
    """
    difference = np.asarray(difference, np.float64)
    if not len(difference):
        raise DataError("a difference over no queries is undefined: evaluate on at least one")
    _, group = np.unique(
        np.arange(len(difference)) if groups is None else groups, return_inverse=True
    )
    more = [group.max() + 1, group.max() + 2]
    interval = mean(np.append(difference, [1, -1]), np.append(group, more))
    value = float(difference.mean())
    low, high = max(-1.0, min(value, interval.low)), min(1.0, max(value, interval.high))
    return Metric(value, low, high, len(difference))


def jackknife(statistic: Callable[[Int[np.ndarray, " n"]], float], n: int) -> Metric:
    """Compute a statistic between 0 and 1 of n units, with its jackknife interval.

    Up to GROUPS groups of units are left out in turn, which gives the variance and the bias
    (Quenouille, 1956, doi:10.1093/biomet/43.3-4.353). The interval is around the corrected value.

    Args:
        statistic: function of the count of each unit; all ones for the value itself.
        n: the number of units, at least two.

    Raises:
        DataError: fewer than two units.
    """
    if n < 2:
        raise DataError(f"{n} unit has no interval: evaluate on at least two")
    group = np.random.default_rng(0).permutation(n) % min(n, GROUPS)
    count = int(group.max()) + 1
    value = statistic(np.ones(n, np.int64))
    left_out = np.array([statistic((group != g).astype(np.int64)) for g in range(count)])
    centre = value - (count - 1) * (float(left_out.mean()) - value)
    variance = (count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum())
    half = student(count - 1) * math.sqrt(variance)
    low, high = max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
    return Metric(value, low, high, n)


def interval(p: float, worth: float, z: float, n: int) -> Metric:
    """Compute the interval of p for `worth` independent trials.

    Wilson's (1927, doi:10.1080/01621459.1927.10502953), but not narrower than the exact one of
    Clopper and Pearson (1934, doi:10.1093/biomet/26.4.404) for up to FEW hits or misses.
    """
    from scipy.special import betaincinv

    z2 = z**2
    centre = (p + z2 / (2 * worth)) / (1 + z2 / worth)
    half = z / (1 + z2 / worth) * math.sqrt(p * (1 - p) / worth + z2 / (4 * worth * worth))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    if min(p, 1 - p) * worth < FEW + 0.5:  # integers, except for rounding and clusters
        trials = worth * Z95**2 / z2
        hits, misses = p * trials, (1 - p) * trials
        low = min(low, float(betaincinv(hits, misses + 1, 0.025)) if hits else 0.0)
        high = max(high, float(betaincinv(hits + 1, misses, 0.975)) if misses else 1.0)
    # At p = 0 and p = 1 the bounds are exact; rounding must not move the value outside of them.
    return Metric(p, min(p, low), max(p, high), n)


def between(residuals: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """Return the variance of a mean from the residuals of clusters, and its degrees of freedom.

    The variance is the jackknife's, as a large cluster pulls the mean towards it. The degrees of
    freedom are two over the squared coefficient of variation of the variance (but 5, if that is
    less), and at most those of the equivalent number of clusters of equal size.
    """
    sizes, n = np.bincount(group), len(group)
    squares = (np.bincount(group, residuals) / (1 - sizes / n)) ** 2
    count, total = len(sizes), float(squares.sum())
    freedom = float(n**2 / (sizes**2).sum() - 1)
    spread = (squares**2).sum() / total**2 - 1 / count if total else 0.0
    if spread > 0:
        freedom = min(freedom, max(5.0, 2 / spread))
    return (count - 1) / count * total / n**2, max(1.0, freedom)


def student(freedom: float) -> float:
    """Return the 97.5% quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
