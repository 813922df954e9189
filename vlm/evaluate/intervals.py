"""Confidence intervals at 95%: of proportions, of means, and of what comes in clusters.

Five captions of one image are not five independent trials. Wherever a metric says which trials
belong together, its interval is that of as many independent trials as the clusters are worth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Num

from vlm.errors import ConfigError, DataError

Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


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
    """`hits` of `n` independent trials, with the Wilson score interval at 95%.

    It keeps its coverage near 0 and 1 and for small n, where the normal interval does not
    (Wilson, 1927, doi:10.1080/01621459.1927.10502953; Brown, Cai and DasGupta, 2001).

    Raises:
        DataError: no trials.
    """
    if n < 1:
        raise DataError(
            "a proportion of zero trials is undefined: evaluate on at least one example"
        )
    return _wilson(hits / n, n, Z95, n)


def clustered_proportion(hits: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"]) -> Metric:
    """The share of hits among trials that come in clusters, with a Wilson interval at 95%.

    The variance is taken between clusters; the interval is that of as many independent trials as
    would have it, at most n, with the quantile of Student's t for the number of clusters (Korn and
    Graubard, 1998, Survey Methodology 24:193-201; Dean and Pagano, 2015,
    doi:10.1093/jssam/smv024). If all trials agree, a cluster counts as one trial.

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
        return _wilson(p, count, Z95, n)
    residuals = np.bincount(group, hits - p)
    variance = count / (count - 1) * float((residuals**2).sum()) / n**2
    worth = min(n, p * (1 - p) / variance) if variance else n
    return _wilson(p, worth, _student(count - 1), n)


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
    return _wilson(p, centre * (1 - centre) / variance, Z95, int(n.sum()))


def bootstrap_mean(
    values: Num[np.ndarray, " n"],
    resamples: int = 2000,
    seed: int = 0,
    groups: Int[np.ndarray, " n"] | None = None,
) -> Metric:
    """The mean of `values` with its percentile bootstrap interval at 95%; `seed` fixes the result.

    For means that are no proportions, such as mean reciprocal rank (Efron, 1979,
    doi:10.1214/aos/1176344552). With `groups`, whole clusters are drawn. Memory is O(n), whatever
    the number of resamples.

    Raises:
        DataError: no values, or values that are not finite.
        ConfigError: fewer than 100 resamples, too few for a 95% interval.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise DataError("a bootstrap takes a list of finite numbers, and at least one")
    _, group = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    sums, sizes = np.bincount(group, values), np.bincount(group)

    def mean(weights: np.ndarray) -> float:
        return float((weights * sums).sum() / (weights * sizes).sum())

    return bootstrap(mean, len(sums), resamples, seed, len(values))


def bootstrap(
    statistic: Callable[[Int[np.ndarray, " n"]], float],
    n: int,
    resamples: int = 1000,
    seed: int = 0,
    count: int | None = None,
) -> Metric:
    """A statistic of n units with its percentile bootstrap interval at 95%.

    Args:
        statistic: of how many times each unit counts; all once for the value itself.
        n: the number of units.
        resamples: how many times n units are drawn.
        seed: fixes the result.
        count: the number of queries to report, n by default.

    Raises:
        ConfigError: fewer than 100 resamples, too few for a 95% interval.
    """
    if resamples < 100:
        raise ConfigError(f"resamples is {resamples}: give at least 100 for a 95% interval")
    rng = np.random.default_rng(seed)
    drawn = [statistic(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Metric(statistic(np.ones(n, np.int64)), float(low), float(high), count or n)


def _wilson(p: float, worth: float, z: float, n: int) -> Metric:
    """The interval of p, measured as well as `worth` independent trials would measure it."""
    z2 = z**2
    centre = (p + z2 / (2 * worth)) / (1 + z2 / worth)
    half = z / (1 + z2 / worth) * math.sqrt(p * (1 - p) / worth + z2 / (4 * worth * worth))
    # At p = 0 and p = 1 the bounds are exact; rounding must not move the value outside of them.
    return Metric(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def _student(freedom: int) -> float:
    """The 97.5% quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
