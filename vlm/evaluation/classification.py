"""How well scores over classes fit: recall of each class, average precision, calibration."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from vlm.errors import DataError
from vlm.evaluation.intervals import Z95, Metric, hit_rate, interval, jackknife, mean_of_proportions
from vlm.evaluation.metrics import checked_target

BINS = 15  # of confidence, as Guo et al., 2017 (arXiv:1706.04599) and most after them
Z90 = 1.6448536269514722  # the 95% quantile of the standard normal distribution

# Of a bin's gap of x standard errors, |x| - CHANCE exp(-x^2 / (2 REACH^2)) is left: whatever the
# gap, within LEFT of it in the mean, the smallest bound at this REACH. Its variance is up to
# INFLATION. A gap of CERTAIN is none by chance.
REACH, CHANCE, LEFT, INFLATION, CERTAIN = 0.7, 0.980, 0.2373, 1.43, 4.0


def target_ranks(
    scores: Num[np.ndarray, "n m"], target: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """How many wrong classes score at least as high as the right one; ties count as misses.

    Raises:
        DataError: sizes that disagree, a target out of range, scores that are not finite.
    """
    scores = checked_scores(scores)
    target = checked_target(target, *scores.shape)
    chosen = np.take_along_axis(scores, target[:, None], axis=1)
    return (scores >= chosen).sum(axis=1) - 1  # the target itself is not its own rival


def classification_metrics(
    scores: Num[np.ndarray, "n m"], target: Int[np.ndarray, " n"], ks: Sequence[int] = (1, 5)
) -> dict[str, Metric]:
    """`top1`, `top5` (of at least k classes) and `mean_per_class_recall`.

    They are CLIP_benchmark's `acc1`, `acc5` and `mean_per_class_recall`, except that a tie counts
    as a miss there where a tie goes to the class that comes first.

    Raises:
        DataError: see `target_ranks`.
    """
    ranks = target_ranks(scores, target)
    found = {f"top{k}": hit_rate(ranks, k) for k in ks if k == 1 or k <= scores.shape[1]}
    return found | {"mean_per_class_recall": mean_per_class_recall(ranks, target)}


def mean_per_class_recall(ranks: Int[np.ndarray, " n"], target: Int[np.ndarray, " n"]) -> Metric:
    """The mean, over the classes that occur, of the share of their images that are right."""
    target = np.asarray(target)
    return mean_of_proportions(np.bincount(target, np.asarray(ranks) == 0), np.bincount(target))


def mean_average_precision(
    scores: Num[np.ndarray, "n m"], relevant: Bool[np.ndarray, "n m"]
) -> Metric:
    """The mean over classes of average precision, for images that show several of them.

    Average precision is the sum of precisions at each threshold, weighted by the recall that it
    adds; images of equal score share a threshold, as in scikit-learn. A class that no image shows
    counts as 0, as in CLIP_benchmark. The interval is the jackknife's over
    images, without its bias.

    Raises:
        DataError: sizes that disagree, or scores that are not finite.
    """
    scores, relevant = checked_scores(scores), np.asarray(relevant, bool)
    if relevant.shape != scores.shape:
        raise DataError(
            f"scores of shape {scores.shape} and labels of {relevant.shape}: give one for each "
            "image and class"
        )
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    truth = np.take_along_axis(relevant, order, axis=0)
    # The last of equal scores stands for all of them.
    last = np.append(ranked[1:] != ranked[:-1], np.ones((1, scores.shape[1]), bool), axis=0)

    def mean(weights: np.ndarray) -> float:
        weight = weights[order].astype(np.float64)
        hits, seen = np.cumsum(weight * truth, axis=0), np.cumsum(weight, axis=0)
        before = np.zeros_like(hits)
        kept = np.where(last, hits, -1.0)
        before[1:] = np.maximum(np.maximum.accumulate(kept, axis=0)[:-1], 0)
        precision = hits / np.maximum(seen, 1)
        gained = np.where(last, (hits - before) * precision, 0).sum(axis=0)
        return float((gained / np.maximum(hits[-1], 1)).mean())

    return jackknife(mean, len(scores))


def calibration_error(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = BINS
) -> Metric:
    """The expected calibration error: how far confidence is from accuracy, without its bias.

    The images are put into bins of equal width by the score of what is predicted; the error is the
    mean over bins, weighted by their images, of |accuracy - mean confidence|. As it is often
    computed, an estimate that differs from zero by chance adds to it (Kumar, Liang and Ma, 2019,
    arXiv:1909.10155): here each bin gives that much less, as far as its gap may be chance. The
    interval adds what bias can remain to Wilson's of the bins (Armstrong and Kolesár, 2018,
    doi:10.3982/ECTA14434): it covers at least 95%, and more where most bins are calibrated.

    Raises:
        DataError: sizes that disagree, values that are not finite.
    """
    confidence, right, at = _binned(confidence, right, bins)
    counts = np.bincount(at, minlength=bins)
    kept = counts > 0
    counts = counts[kept]
    share = counts / len(at)
    sure, accuracy = (
        np.bincount(at, x, minlength=bins)[kept] / counts for x in (confidence, right)
    )
    gap = np.abs(accuracy - sure)
    # Where few images are all right, one more that is right as often as claimed keeps a spread.
    drawn = (accuracy * counts + sure) / (counts + 1)
    spread = np.maximum(np.sqrt(drawn * (1 - drawn) / counts), 1e-9)
    ratio = gap / spread
    unsure = ratio < CERTAIN
    value = float(share @ (gap - spread * CHANCE * np.exp(-(ratio**2) / (2 * REACH**2))))

    own = [interval(p, float(n), Z95, int(n)) for p, n in zip(accuracy, counts, strict=True)]
    up, down = np.array([(m.high - m.value, m.value - m.low) for m in own]).T
    up, down = np.where(accuracy >= sure, (up, down), (down, up))  # of the gap, without its sign
    between = max(0.0, float(share @ gap**2 - (share @ gap) ** 2)) / len(at)
    bias = LEFT * float((share * spread)[unsure].sum())
    inflated = np.where(unsure, INFLATION, 1.0)
    above, below = (
        _biased_margin(math.sqrt(float(inflated @ (share * side / Z95) ** 2) + between), bias)
        for side in (up, down)
    )
    plain = float(share @ gap)
    found = min(max(value, 0.0), plain)
    low, high = max(0.0, value - below), min(1.0, value + above)
    return Metric(found, min(low, found), max(high, found), len(at))


def _biased_margin(deviation: float, bias: float) -> float:
    """The half width that covers 95% of a normal estimate with a bias of up to `bias`."""
    from scipy.special import chndtrix

    if bias > 4 * deviation:  # one side is all of it
        return bias + Z90 * deviation
    return deviation * math.sqrt(chndtrix(0.95, 1, (bias / deviation) ** 2)) if deviation else 0.0


def reliability(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = BINS
) -> list[tuple[float, float, int]]:
    """For each bin with images: their mean confidence, their accuracy, their number."""
    confidence, right, at = _binned(confidence, right, bins)
    rows = []
    for b in range(bins):
        here = at == b
        if here.any():
            rows.append(
                (float(confidence[here].mean()), float(right[here].mean()), int(here.sum()))
            )
    return rows


def confusion(
    predicted: Int[np.ndarray, " n"], target: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "m m"]:
    """Counts by right class (rows) and predicted class (columns)."""
    flat = np.bincount(np.asarray(target) * classes + np.asarray(predicted), minlength=classes**2)
    return flat.reshape(classes, classes)


def checked_scores(scores: np.ndarray) -> np.ndarray:
    """`scores` as (n, m), or a DataError that says what is wrong with them."""
    scores = np.asarray(scores)
    if scores.ndim != 2 or not scores.size:
        raise DataError(f"scores must be (n, m) and not empty, not of shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise DataError("scores hold values that are not finite: look at the model's weights")
    return scores


def _binned(confidence, right, bins):
    confidence = checked_scores(np.asarray(confidence)[:, None]).astype(np.float64)[:, 0]
    right = np.asarray(right, np.float64)
    if right.shape != confidence.shape:
        raise DataError(f"{len(confidence)} scores and {len(right)} outcomes: give one each")
    at = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return confidence, right, at
