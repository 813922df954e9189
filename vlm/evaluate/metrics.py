"""Zero-shot accuracy and retrieval recall, each with its 95% confidence interval.

Everything here is a pure function of embeddings or scores, so a trainer can call it in the middle
of a run. One quantity carries it all: the *rank* of a query's best right answer, that is how many
wrong answers score at least as high. A tie counts against the model, so a collapsed encoder that
gives every caption the same embedding scores zero rather than chance or, worse, all right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num

from vlm.errors import ConfigError, DataError

Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution

# Cosines in float32 closer than this are one number: the order in which a product sums its terms
# moves them by a few 1e-7, and a tie must not be broken by that.
TIE = 1e-6

# A tile of similarities is at most this large (32 MB in float32), whatever the sizes of the sets.
QUERY_BLOCK, KEY_BLOCK = 1024, 8192


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


# -------------------------------------------------------------------------- the public face


def zero_shot_metrics(
    z_image: Float[np.ndarray, "n d"],
    z_captions: Float[np.ndarray, "m d"],
    target: Int[np.ndarray, " n"],
    ks: Sequence[int] = (1, 5),
) -> dict[str, Metric]:
    """Top-k accuracy of choosing each image's caption among all captions.

    Args:
        z_image: image embeddings, unit norm.
        z_captions: one embedding per caption or class, unit norm, distinct.
        target: the index of each image's right caption.
        ks: the k of the names `top1`, `top5`, ... in the result.

    Raises:
        DataError: sizes that disagree, a target out of range, embeddings that are not finite.
        ConfigError: a k below 1.
    """
    z_image, z_captions = _embeddings(z_image, "z_image"), _embeddings(z_captions, "z_captions")
    target = _target(target, len(z_image), len(z_captions))
    rows = np.arange(len(target))
    ranks = best_ranks(z_image, z_captions, np.stack([rows, target], axis=1))
    return {f"top{k}": hit_rate(ranks, k) for k in ks}


def pair_retrieval_metrics(
    z_image: Float[np.ndarray, "n d"],
    z_text: Float[np.ndarray, "m d"],
    positives: Int[np.ndarray, "p 2"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Metric]:
    """Retrieval recall at k in both directions: `image_to_text_R@k` and `text_to_image_R@k`.

    A query is a hit when any of its positives is among its first k answers, as COCO and Flickr30k
    retrieval is scored (Karpathy and Fei-Fei, 2015, arXiv:1412.2306). Texts and images without a
    positive serve as distractors and are not queries.

    Args:
        z_image: image embeddings, unit norm.
        z_text: text embeddings, unit norm.
        positives: (image index, text index) of every right pair; None pairs row i with row i.
        ks: the k to report.

    Raises:
        DataError: sizes that disagree, an index out of range, embeddings that are not finite.
        ConfigError: a k below 1.
    """
    recall = retrieval_recall(z_image, z_text, positives, ks)
    return {f"{way}_R@{k}": metric for way, by_k in recall.items() for k, metric in by_k.items()}


def retrieval_recall(
    z_image: Float[np.ndarray, "n d"],
    z_text: Float[np.ndarray, "m d"],
    positives: Int[np.ndarray, "p 2"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[int, Metric]]:
    """Recall at k, keyed by direction and then k: see `pair_retrieval_metrics`."""
    z_image, z_text = _embeddings(z_image, "z_image"), _embeddings(z_text, "z_text")
    if positives is None:
        if len(z_image) != len(z_text):
            raise DataError(
                f"{len(z_image)} images and {len(z_text)} texts cannot be paired row by row: "
                "give `positives`, the (image, text) index pairs"
            )
        positives = np.repeat(np.arange(len(z_image))[:, None], 2, axis=1)
    positives = _pairs(positives)
    result = {}
    for way, z_query, z_key, pairs in (
        ("image_to_text", z_image, z_text, positives),
        ("text_to_image", z_text, z_image, positives[:, ::-1]),
    ):
        ranks = best_ranks(z_query, z_key, pairs)
        result[way] = {k: hit_rate(ranks[ranks >= 0], k) for k in ks}
    return result


def topk_accuracy(
    scores: Num[np.ndarray, "n m"],
    target: Int[np.ndarray, " n"],
    ks: Sequence[int] = (1, 5),
) -> dict[int, Metric]:
    """Share of rows whose target is among the k highest scores, by k; ties count as misses.

    Raises:
        DataError: sizes that disagree, a target out of range, scores that are not finite.
        ConfigError: a k below 1.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or not scores.size:
        raise DataError(f"scores must be (n, m) and not empty, not of shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise DataError("scores hold values that are not finite: look at the model's weights")
    target = _target(target, *scores.shape)
    chosen = np.take_along_axis(scores, target[:, None], axis=1)
    ranks = (scores >= chosen).sum(axis=1) - 1  # the target itself is not its own rival
    return {k: hit_rate(ranks, k) for k in ks}


# ----------------------------------------------------------------------------------- ranks


def best_ranks(
    z_query: Float[np.ndarray, "q d"],
    z_key: Float[np.ndarray, "m d"],
    pairs: Int[np.ndarray, "p 2"],
) -> Int[np.ndarray, " q"]:
    """For each query, how many wrong keys score at least as high as its best right key.

    Memory is bounded by one tile of similarities. A query without a right key has rank -1.

    Args:
        z_query: query embeddings, unit norm.
        z_key: key embeddings, unit norm.
        pairs: (query index, key index) of the right answers, any number per query.

    Raises:
        DataError: widths that disagree or an index out of range.
    """
    if z_query.shape[1] != z_key.shape[1]:
        raise DataError(
            f"embeddings of {z_query.shape[1]} and {z_key.shape[1]} dimensions cannot be compared: "
            "encode both with the same model"
        )
    pairs = _pairs(pairs)
    for column, size in ((0, len(z_query)), (1, len(z_key))):
        bad = (pairs[:, column] < 0) | (pairs[:, column] >= size)
        if bad.any():
            raise DataError(
                f"positives name row {pairs[bad][0, column]}, but there are {size} rows"
            )
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]

    best = np.full(len(z_query), -np.inf, np.float32)
    for start in range(0, len(pairs), KEY_BLOCK):
        query, key = pairs[start : start + KEY_BLOCK].T
        np.maximum.at(best, query, np.einsum("pd,pd->p", z_query[query], z_key[key]))

    ranks = np.full(len(z_query), -1, np.int64)
    for q in range(0, len(z_query), QUERY_BLOCK):
        rows = slice(q, q + QUERY_BLOCK)
        first, last = np.searchsorted(pairs[:, 0], [q, q + QUERY_BLOCK])
        query, key = pairs[first:last].T
        rivals = np.zeros(len(best[rows]), np.int64)
        for k in range(0, len(z_key), KEY_BLOCK):
            tile = z_query[rows] @ z_key[k : k + KEY_BLOCK].T
            here = (key >= k) & (key < k + KEY_BLOCK)
            tile[query[here] - q, key[here] - k] = -np.inf  # right answers are no rivals
            rivals += (tile >= best[rows, None] - TIE).sum(axis=1)
        ranks[rows] = np.where(np.isfinite(best[rows]), rivals, -1)
    return ranks


# ------------------------------------------------------------------------------- intervals


def hit_rate(ranks: Int[np.ndarray, " n"], k: int) -> Metric:
    """The share of ranks below k, with its Wilson interval.

    Raises:
        DataError: no ranks at all.
        ConfigError: a k below 1.
    """
    if k < 1:
        raise ConfigError(f"k is {k}: the first k answers are counted from k = 1")
    return proportion(int((np.asarray(ranks) < k).sum()), len(ranks))


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
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At p = 0 and p = 1 the bounds are exact; rounding must not move the value outside of them.
    return Metric(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def bootstrap_mean(values: Num[np.ndarray, " n"], resamples: int = 2000, seed: int = 0) -> Metric:
    """The mean of `values` with its percentile bootstrap interval at 95%; `seed` fixes the result.

    For means that are no proportions, such as mean reciprocal rank or mean per-class accuracy
    (Efron, 1979, doi:10.1214/aos/1176344552). Memory is O(n), whatever the number of resamples.

    Raises:
        DataError: no values, or values that are not finite.
        ConfigError: fewer than 100 resamples, too few for a 95% interval.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise DataError("a bootstrap takes a list of finite numbers, and at least one")
    if resamples < 100:
        raise ConfigError(f"resamples is {resamples}: give at least 100 for a 95% interval")
    rng = np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Metric(float(values.mean()), float(low), float(high), n)


# ---------------------------------------------------------------------------------- checks


def _embeddings(z: np.ndarray, name: str) -> np.ndarray:
    """`z` as float32 (n, d), or a DataError that says what is wrong with it."""
    z = np.asarray(z, np.float32)
    if z.ndim != 2 or not z.size:
        raise DataError(f"{name} must be (n, d) and not empty, not of shape {z.shape}")
    finite = np.isfinite(z).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{name} has {(~finite).sum()} of {len(z)} rows that are not finite, the first at "
            f"{np.argmin(finite)}: look at the model's weights or lower the learning rate"
        )
    return z


def _pairs(pairs: np.ndarray) -> np.ndarray:
    """`pairs` as integers (p, 2), or a DataError that says what they are instead."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise DataError(f"positives must be integer pairs (p, 2), not {pairs.dtype}{pairs.shape}")
    return pairs


def _target(target: np.ndarray, n: int, m: int) -> np.ndarray:
    """`target` as n indices below m, or a DataError that names the first that is not."""
    target = np.asarray(target)
    if target.shape != (n,) or not np.issubdtype(target.dtype, np.integer):
        raise DataError(
            f"target must be {n} integers, one per image, not {target.dtype}{target.shape}"
        )
    bad = (target < 0) | (target >= m)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"target {target[row]} of image {row} is outside the {m} captions")
    return target
