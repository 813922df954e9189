"""How well scores over classes fit: recall of each class, average precision, calibration."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from vlm.errors import DataError
from vlm.evaluate.intervals import Metric, bootstrap, hit_rate, mean_of_proportions
from vlm.evaluate.metrics import checked_target

BINS = 15  # of confidence, as Guo et al., 2017 (arXiv:1706.04599) and most after them
RESAMPLES = 500


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
    scores: Num[np.ndarray, "n m"], relevant: Bool[np.ndarray, "n m"], resamples: int = RESAMPLES
) -> Metric:
    """The mean over classes of average precision, for images that show several of them.

    Average precision is the sum of precisions at each threshold, weighted by the recall that it
    adds; images of equal score share a threshold, as in scikit-learn. A class that no image shows
    counts as 0, as in CLIP_benchmark. The interval is a bootstrap over images.

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

    return bootstrap(mean, len(scores), resamples)


def calibration_error(
    confidence: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    bins: int = BINS,
    resamples: int = RESAMPLES,
) -> Metric:
    """The expected calibration error: how far confidence is from accuracy, on the whole.

    The images are put into bins of equal width by the score of what is predicted; the error is the
    mean over bins, weighted by their images, of |accuracy - mean confidence|. Of few images it is
    above zero even for a calibrated model. The interval is a bootstrap over images.

    Raises:
        DataError: sizes that disagree, values that are not finite.
    """
    confidence, right, at = _binned(confidence, right, bins)

    def error(weights: np.ndarray) -> float:
        gaps = np.bincount(at, weights * (right - confidence), minlength=bins)
        return float(np.abs(gaps).sum() / weights.sum())

    return bootstrap(error, len(confidence), resamples)


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
