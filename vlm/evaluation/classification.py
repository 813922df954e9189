"""Metrics of scores over classes: recall per class, average precision, calibration."""

import math

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from vlm.errors import DataError
from vlm.evaluation.intervals import Z95, Metric, interval, jackknife, mean_of_proportions
from vlm.evaluation.metrics import checked_target

BINS = 15  # of confidence, as in Guo et al., 2017 (arXiv:1706.04599)
Z90 = 1.6448536269514722  # the 95% quantile of the standard normal distribution

# A bin's gap of x standard errors is corrected to |x| - CHANCE exp(-x^2 / (2 REACH^2)). Its bias is
# at most LEFT, the smallest bound at this REACH, and its variance at most INFLATION. A gap of
# CERTAIN cannot be by chance.
REACH, CHANCE, LEFT, INFLATION, CERTAIN = 0.7, 0.980, 0.2373, 1.43, 4.0


def target_ranks(
    scores: Num[np.ndarray, "n m"], target: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Count the wrong classes that score at least as high as the target; ties count as misses.

    Raises:
        DataError: sizes that disagree, a target out of range, non-finite scores.
    """
    scores = checked_scores(scores)
    target = checked_target(target, *scores.shape)
    chosen = np.take_along_axis(scores, target[:, None], axis=1)
    return (scores >= chosen).sum(axis=1) - 1  # without the target itself


def mean_per_class_recall(ranks: Int[np.ndarray, " n"], target: Int[np.ndarray, " n"]) -> Metric:
    """Compute the mean recall of the classes that occur."""
    target = np.asarray(target)
    return mean_of_proportions(np.bincount(target, np.asarray(ranks) == 0), np.bincount(target))


def mean_average_precision(
    scores: Num[np.ndarray, "n m"], relevant: Bool[np.ndarray, "n m"]
) -> Metric:
    """Compute the mean average precision over classes, for images with several labels.

    Average precision is the sum of precisions at each threshold, weighted by the increase of
    recall; images of equal score share a threshold, as in scikit-learn. A class without images
    counts as 0, as in CLIP_benchmark. The interval is the bias-corrected jackknife over images.

    Raises:
        DataError: sizes that disagree, or non-finite scores.
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
    # The last of equal scores is the threshold of all.
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
    """Estimate the expected calibration error without its bias.

    Images are binned by the score of the prediction; the error is the mean over bins, weighted by
    images, of `abs(accuracy - confidence)`. The usual estimate is biased: a chance difference adds
    to it (Kumar, Liang and Ma, 2019, arXiv:1909.10155). Here each bin's gap is reduced as far as it
    may be chance. The interval adds the remaining bias to Wilson's of the bins (Armstrong and
    Kolesár, 2018, doi:10.3982/ECTA14434): it covers at least 95%, more if most bins are calibrated.

    Raises:
        DataError: sizes that disagree, non-finite values.

    Example:
        >>> confidence, right = np.full(100, 0.8, np.float32), np.arange(100) < 80
        >>> vlm.evaluation.calibration_error(confidence, right).value < 0.01
        True
    """
    confidence, right, at = _binned(confidence, right, bins)
    counts = np.bincount(at, minlength=bins)
    kept = counts > 0
    counts = counts[kept]
    fraction = counts / len(at)
    sure, accuracy = (
        np.bincount(at, x, minlength=bins)[kept] / counts for x in (confidence, right)
    )
    gap = np.abs(accuracy - sure)
    # One more image, as accurate as its confidence, keeps a spread if few images are all right.
    drawn = (accuracy * counts + sure) / (counts + 1)
    spread = np.maximum(np.sqrt(drawn * (1 - drawn) / counts), 1e-9)
    ratio = gap / spread
    unsure = ratio < CERTAIN
    value = float(fraction @ (gap - spread * CHANCE * np.exp(-(ratio**2) / (2 * REACH**2))))

    own = [interval(p, float(n), Z95, int(n)) for p, n in zip(accuracy, counts, strict=True)]
    up, down = np.array([(m.high - m.value, m.value - m.low) for m in own]).T
    up, down = np.where(accuracy >= sure, (up, down), (down, up))  # of the absolute gap
    between = max(0.0, float(fraction @ gap**2 - (fraction @ gap) ** 2)) / len(at)
    bias = LEFT * float((fraction * spread)[unsure].sum())
    inflated = np.where(unsure, INFLATION, 1.0)
    above, below = (
        _biased_margin(math.sqrt(float(inflated @ (fraction * side / Z95) ** 2) + between), bias)
        for side in (up, down)
    )
    plain = float(fraction @ gap)
    bounded = min(max(value, 0.0), plain)
    low, high = max(0.0, value - below), min(1.0, value + above)
    return Metric(bounded, min(low, bounded), max(high, bounded), len(at))


def _biased_margin(deviation: float, bias: float) -> float:
    """Compute the half width that covers 95% of a normal estimate with a bias up to `bias`."""
    from scipy.special import chndtrix

    if bias > 4 * deviation:  # one-sided
        return bias + Z90 * deviation
    return deviation * math.sqrt(chndtrix(0.95, 1, (bias / deviation) ** 2)) if deviation else 0.0


def reliability(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = BINS
) -> list[tuple[float, float, int]]:
    """Return mean confidence, accuracy and count of each bin that has images.

    Example:
        >>> vlm.evaluation.reliability(np.full(4, 0.5, np.float32), np.arange(4) < 3)
        [(0.5, 0.75, 4)]
    """
    confidence, right, at = _binned(confidence, right, bins)
    return [
        (float(confidence[own].mean()), float(right[own].mean()), int(own.sum()))
        for own in (at == b for b in np.unique(at))
    ]


def confusion(
    predicted: Int[np.ndarray, " n"], target: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "m m"]:
    """Count images by target class (rows) and predicted class (columns)."""
    flat = np.bincount(np.asarray(target) * classes + np.asarray(predicted), minlength=classes**2)
    return flat.reshape(classes, classes)


def checked_scores(scores: np.ndarray) -> np.ndarray:
    """Check that `scores` are finite (n, m), or raise a DataError."""
    scores = np.asarray(scores)
    if scores.ndim != 2 or not scores.size:
        raise DataError(f"scores must be (n, m) and not empty, not of shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise DataError("scores have values that are not finite: check the model's weights")
    return scores


def _binned(confidence, right, bins):
    confidence = checked_scores(np.asarray(confidence)[:, None]).astype(np.float64)[:, 0]
    right = np.asarray(right, np.float64)
    if right.shape != confidence.shape:
        raise DataError(f"{len(confidence)} scores and {len(right)} outcomes: give one each")
    at = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return confidence, right, at
