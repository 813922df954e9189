"""Confidence intervals at 95%: of proportions, of means, and of what comes in clusters.

Their coverage is measured: `python tests/evaluation/coverage.py` prints it.

Five captions of one image are not five independent trials. Wherever a metric says which trials
belong together, its interval is that of as many independent trials as the clusters are worth.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Num

from vlm.errors import ConfigError, DataError

Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution
MEASURED = 200  # queries from which tests/evaluation/coverage.py measures coverage
GROUPS = 100  # of a jackknife
FEW = 8  # hits or misses: Wilson's interval alone covers as little as 84% there


@dataclass(frozen=True)
class Metric:
    """A measured value, its 95% confidence interval, and the number of queries behind it."""

    value: float
    low: float
    high: float
    n: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.n:,}"


def caveat(metrics: Iterable[Metric]) -> str:
    """A sentence for tables with intervals whose coverage is not measured to be 93 to 97%."""
    if all(metric.n >= MEASURED for metric in metrics):
        return ""
    return (
        f"Intervals of fewer than {MEASURED} queries are approximate, but for plain proportions, "
        "which they cover in at least 93 of 100 samples from 20 queries on."
    )


def hit_rate(ranks: Int[np.ndarray, " n"], k: int, groups: np.ndarray | None = None) -> Metric:
    """The share of ranks below k, with its Wilson interval; by clusters if `groups` are given.

    Raises:
        DataError: no ranks at all.
        ConfigError: a k below 1.
    """
    if k < 1:
        raise ConfigError(f"k is {k}: the first k answers are counted from k = 1")
    hits = np.asarray(ranks) < k
    if groups is not None:
        return clustered_proportion(hits, groups)
    return proportion(int(hits.sum()), len(hits))


def proportion(hits: int, n: int) -> Metric:
    """`hits` of `n` independent trials, with the interval at 95% of `interval`.

    It covers at least 92.5% at every rate from n = 20, and up to 97.5% where ten hits and misses or
    more are expected; where fewer are, more.

    Raises:
        DataError: no trials.
    """
    if n < 1:
        raise DataError(
            "a proportion of zero trials is undefined: evaluate on at least one example"
        )
    return interval(hits / n, n, Z95, n)


def clustered_proportion(hits: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"]) -> Metric:
    """The share of hits among trials that come in clusters, with a Wilson interval at 95%.

    The variance is taken between clusters; the interval is that of as many independent trials as
    would have it, at most n, with the quantile of Student's t for the number of clusters (Korn and
    Graubard, 1998, Survey Methodology 24:193-201; Dean and Pagano, 2015,
    doi:10.1093/jssam/smv024). If all trials agree, a cluster counts as one trial, and towards that
    where the misses (or hits) are in few clusters.

    Args:
        hits: of each trial.
        groups: the cluster of each trial.

    Raises:
        DataError: no trials, or another number of groups.
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
    # Where few clusters differ from the rest, these say little of the others.
    misses = np.bincount(group, 1 - hits if p > 0.5 else hits)
    worth = 1 / (max(variance / (p * (1 - p)), 1 / n) + 1 / (count * (misses > 0).sum() ** 2))
    return interval(p, worth, student(freedom), n)


def mean_of_proportions(hits: Num[np.ndarray, " m"], n: Num[np.ndarray, " m"]) -> Metric:
    """The mean of m independent proportions, each counting the same, with its interval at 95%.

    A Wilson interval of as many trials as have the variance of that mean, where each variance is
    taken at a proportion drawn a little to the middle (Agresti and Coull, 1998): a class with all
    hits is not known without doubt.

    Args:
        hits: of each proportion.
        n: its trials; those without any are left out.

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
    """The mean of `values`, by clusters if `groups` are given, with Student's interval at 95%.

    For means that are no proportions, such as mean reciprocal rank. The variance is that of the
    jackknife over clusters (MacKinnon and White, 1985, doi:10.1016/0304-4076(85)90158-7).

    Raises:
        DataError: values that are not finite, or fewer than two clusters of them.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise DataError("a mean takes a list of finite numbers, and at least one")
    _, group = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    n, found = len(values), float(values.mean())
    if group.max() == 0:
        raise DataError("one cluster of values has no interval: give at least two")
    variance, freedom = between(values - found, group)
    half = student(freedom) * math.sqrt(variance)
    return Metric(found, found - half, found + half, n)


def paired_difference(
    difference: Num[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None = None
) -> Metric:
    """The mean of differences of outcomes, -1, 0 or 1, by clusters, with its interval at 95%.

    That of `mean` with one more pair of either sign, as Bonett and Price (2012,
    doi:10.3102/1076998611411915) have it: equal answers to all queries do not show that two models
    are equal.

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
    found = mean(np.append(difference, [1, -1]), np.append(group, more))
    value = float(difference.mean())
    low, high = max(-1.0, min(value, found.low)), min(1.0, max(value, found.high))
    return Metric(value, low, high, len(difference))


def jackknife(statistic: Callable[[Int[np.ndarray, " n"]], float], n: int) -> Metric:
    """A statistic of n units between 0 and 1 with its jackknife interval at 95%.

    Up to GROUPS groups of units are left out in turn, which gives the variance and the bias, around
    which the interval is (Quenouille, 1956, doi:10.1093/biomet/43.3-4.353).

    Args:
        statistic: of how many times each unit counts; all once for the value itself.
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
    """The interval of p, measured as well as `worth` independent trials would measure it.

    Wilson's (1927, doi:10.1080/01621459.1927.10502953); where these have no more than FEW hits or
    misses, not narrower than the exact one of Clopper and Pearson (1934,
    doi:10.1093/biomet/26.4.404).
    """
    from scipy.special import betaincinv

    z2 = z**2
    centre = (p + z2 / (2 * worth)) / (1 + z2 / worth)
    half = z / (1 + z2 / worth) * math.sqrt(p * (1 - p) / worth + z2 / (4 * worth * worth))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    if min(p, 1 - p) * worth < FEW + 0.5:  # whole numbers, but for rounding and clusters
        trials = worth * Z95**2 / z2
        hits, misses = p * trials, (1 - p) * trials
        low = min(low, float(betaincinv(hits, misses + 1, 0.025)) if hits else 0.0)
        high = max(high, float(betaincinv(hits + 1, misses, 0.975)) if misses else 1.0)
    # At p = 0 and p = 1 the bounds are exact; rounding must not move the value outside of them.
    return Metric(p, min(p, low), max(p, high), n)


def between(residuals: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """The variance of a mean from the residuals of clusters, and its degrees of freedom.

    The variance is the jackknife's: a large cluster draws the mean to itself. Its degrees of
    freedom are two over the squared coefficient of variation of the variance (but 5, if that is
    less), and not more than there are clusters of equal size that would be worth these.
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
    """The 97.5% quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
