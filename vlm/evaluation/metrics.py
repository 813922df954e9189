"""Accuracy among captions and retrieval recall, each with its 95% confidence interval.

Everything here is a pure function of embeddings or scores, so a trainer can call it in the middle
of a run. One quantity carries it all: the *rank* of a query's best right answer, that is how many
wrong answers score at least as high. A tie counts against the model, so a collapsed encoder that
gives every caption the same embedding scores zero rather than chance or, worse, all right.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vlm.errors import DataError
from vlm.evaluation.intervals import Metric, hit_rate

# Cosines in float32 closer than this are one number: the order in which a product sums its terms
# moves them by a few 1e-7, and a tie must not be broken by that.
TIE = 1e-6

# A tile of similarities is at most this large (32 MB in float32), whatever the sizes of the sets.
QUERY_BLOCK, KEY_BLOCK = 1024, 8192


# -------------------------------------------------------------------------- the public face


def zero_shot_metrics(
    z_image: Float[np.ndarray, "n d"],
    z_captions: Float[np.ndarray, "m d"],
    target: Int[np.ndarray, " n"],
    ks: Sequence[int] = (1, 5),
    names: Sequence[str] | None = None,
) -> dict[str, Metric]:
    """Top-k accuracy of choosing each image's caption among all captions.

    Args:
        z_image: image embeddings, unit norm.
        z_captions: one embedding per caption or class, unit norm.
        target: the index of each image's right caption.
        ks: the k of the names `top1`, `top5`, ... in the result.
        names: of the classes, where several may have the same: see `caption_ranks`.

    Raises:
        DataError: sizes that disagree, a target out of range, embeddings that are not finite.
        ConfigError: a k below 1.
    """
    ranks = caption_ranks(z_image, z_captions, target, names)
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
    positive serve as distractors and are not queries. The captions of one image are not
    independent: the intervals count them as one cluster.

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
        asked = ranks >= 0
        groups = clusters(pairs, len(z_query), len(z_key))[asked]
        result[way] = {k: hit_rate(ranks[asked], k, groups) for k in ks}
    return result


# ----------------------------------------------------------------------------------- ranks


def caption_ranks(
    z_image: Float[np.ndarray, "n d"],
    z_captions: Float[np.ndarray, "m d"],
    target: Int[np.ndarray, " n"],
    names: Sequence[str] | None = None,
) -> Int[np.ndarray, " n"]:
    """For each image, how many wrong captions score at least as high as its own.

    Classes of one name, as ImageNet has two called "missile", tie for every image. The first of
    them is taken to come first, as in CLIP_benchmark; other ties count against the model.

    Raises:
        DataError: sizes that disagree, a target out of range, embeddings that are not finite.
    """
    z_image, z_captions = _embeddings(z_image, "z_image"), _embeddings(z_captions, "z_captions")
    target = checked_target(target, len(z_image), len(z_captions))
    ranks = best_ranks(z_image, z_captions, np.stack([np.arange(len(target)), target], axis=1))
    if names is None:
        return ranks
    seen: dict[str, int] = {}
    later = np.zeros(len(names), np.int64)  # classes of the same name after each
    for i in reversed(range(len(names))):
        later[i] = seen.get(names[i], 0)
        seen[names[i]] = later[i] + 1
    return ranks - later[target]


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


def clusters(pairs: Int[np.ndarray, "p 2"], queries: int, keys: int) -> Int[np.ndarray, " queries"]:
    """For each query the group of those that it shares right answers with, directly or not."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = (np.ones(len(pairs), bool), (pairs[:, 0], queries + pairs[:, 1]))
    graph = coo_array(edges, shape=(queries + keys,) * 2)
    return connected_components(graph, directed=False)[1][:queries]


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


def checked_target(target: np.ndarray, n: int, m: int) -> np.ndarray:
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
