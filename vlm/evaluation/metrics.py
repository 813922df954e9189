"""Accuracy among captions, retrieval recall and caption selection, with 95% intervals.

All are pure functions of embeddings, so they can be computed during training. They are based on the
*rank* of a query's best correct answer: the number of wrong answers that score at least as high. A
tie counts against the model, so a collapsed encoder scores zero, not chance or 100%.

An image may have several vectors (BLIP-2): its cosine with a text is that of the most similar one.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vlm.errors import DataError
from vlm.evaluation.intervals import Metric, hit_rate, proportion

# Cosines in float32 closer than this are equal: the order of summation changes them by a few 1e-7,
# which must not break a tie.
TIE = 1e-6

# Largest tile of similarities: 32 MB in float32.
QUERY_BLOCK, KEY_BLOCK = 1024, 8192


def zero_shot_metrics(
    z_image: Float[np.ndarray, "n *v d"],
    z_captions: Float[np.ndarray, "m d"],
    target: Int[np.ndarray, " n"],
    ks: Sequence[int] = (1, 5),
    names: Sequence[str] | None = None,
) -> dict[str, Metric]:
    """Compute the top-k accuracy of choosing each image's caption among all captions.

    Args:
        z_image: image embeddings, unit norm.
        z_captions: one embedding per caption or class, unit norm.
        target: the caption index of each image.
        ks: the k of the names `top1`, `top5`, ... in the result.
        names: of the classes, if several may be equal: see `caption_ranks`.

    Raises:
        DataError: sizes that disagree, a target out of range, non-finite embeddings.
        ConfigError: a k below 1.
    """
    ranks = caption_ranks(z_image, z_captions, target, names)
    return {f"top{k}": hit_rate(ranks, k) for k in ks}


def pair_retrieval_metrics(
    z_image: Float[np.ndarray, "n *v d"],
    z_text: Float[np.ndarray, "m d"],
    positives: Int[np.ndarray, "p 2"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Metric]:
    """Compute recall at k in both directions: `image_to_text_R@k` and `text_to_image_R@k`.

    A query is a hit if any of its positives is among its first k answers, as in COCO and Flickr30k
    retrieval (Karpathy and Fei-Fei, 2015, arXiv:1412.2306). Texts and images without a positive are
    distractors, not queries. The captions of one image are not independent: intervals count them
    as one cluster.

    Args:
        z_image: image embeddings, unit norm.
        z_text: text embeddings, unit norm.
        positives: (image index, text index) of every correct pair; None pairs row i with row i.
        ks: the k to report.

    Raises:
        DataError: sizes that disagree, an index out of range, non-finite embeddings.
        ConfigError: a k below 1.
    """
    directions = retrieval_ranks(z_image, z_text, positives)
    return {f"{d.name}_R@{k}": hit_rate(d.ranks, k, d.clusters) for d in directions for k in ks}


class RetrievalRanks(NamedTuple):
    """Ranks of the queries of one direction.

    Attributes:
        name: "image_to_text" or "text_to_image".
        queries: rows that have a correct answer.
        ranks: of each query.
        clusters: of each query.
        z_query, z_key: embeddings of the queries and of all answers.
    """

    name: str
    queries: Int[np.ndarray, " q"]
    ranks: Int[np.ndarray, " q"]
    clusters: Int[np.ndarray, " q"]
    z_query: Float[np.ndarray, "q *v d"]
    z_key: Float[np.ndarray, "m *w d"]


def retrieval_ranks(
    z_image: Float[np.ndarray, "n *v d"],
    z_text: Float[np.ndarray, "m d"],
    positives: Int[np.ndarray, "p 2"] | None = None,
) -> list[RetrievalRanks]:
    """Compute the ranks of both directions: see `pair_retrieval_metrics`."""
    z_image, z_text = _embeddings(z_image, "z_image"), _embeddings(z_text, "z_text")
    if positives is None:
        if len(z_image) != len(z_text):
            raise DataError(
                f"{len(z_image)} images and {len(z_text)} texts cannot be paired row by row: "
                "give `positives`, the (image, text) index pairs"
            )
        positives = np.repeat(np.arange(len(z_image))[:, None], 2, axis=1)
    positives = _pairs(positives)
    result = []
    for name, z_query, z_key, pairs in (
        ("image_to_text", z_image, z_text, positives),
        ("text_to_image", z_text, z_image, positives[:, ::-1]),
    ):
        ranks = best_ranks(z_query, z_key, pairs)
        asked = np.flatnonzero(ranks >= 0)
        groups = clusters(pairs, len(z_query), len(z_key))[asked]
        result.append(RetrievalRanks(name, asked, ranks[asked], groups, z_query[asked], z_key))
    return result


def selection_hits(
    z_image: Float[np.ndarray, "n i *v d"], z_text: Float[np.ndarray, "n c d"]
) -> dict[str, Bool[np.ndarray, " n"]]:
    """Return for each instance whether every choice is correct; image j belongs to caption j.

    `text_acc`: each image is nearest to its own caption. `image_acc`: each caption is nearest to
    its own image. `acc`: both. A tie is a miss (CLIP_benchmark chooses the first). Winoground
    (arXiv:2204.03162) has two images and two captions per instance, SugarCrepe (arXiv:2306.14610)
    one image, its caption and a wrong one.

    Raises:
        DataError: other shapes, or non-finite embeddings.
    """
    z_image, z_text = np.asarray(z_image, np.float32), np.asarray(z_text, np.float32)
    if (
        z_image.ndim not in (3, 4)
        or z_text.ndim != 3
        or len(z_image) != len(z_text)
        or not z_image.size
    ):
        raise DataError(
            f"images of shape {z_image.shape} and captions of {z_text.shape}: give the same "
            "number of instances, (n, images, d) and (n, captions, d)"
        )
    if not (np.isfinite(z_image).all() and np.isfinite(z_text).all()):
        raise DataError("embeddings have values that are not finite: check the model's weights")
    scores = np.einsum("ni...d,ncd->nic...", z_image, z_text)
    scores = scores.max(axis=3) if scores.ndim == 4 else scores
    count = min(scores.shape[1:])
    own = np.einsum("njj->nj", scores[:, :count, :count])
    # The number of choices at least as near: 1, the correct one itself, for a hit.
    texts = (scores[:, :count] >= own[:, :, None]).sum(axis=2)
    images = (scores[:, :, :count] >= own[:, None]).sum(axis=1)
    text, image = (texts == 1).all(axis=1), (images == 1).all(axis=1)
    return {"image_acc": image, "text_acc": text, "acc": image & text}


def selection_metrics(hits: Mapping[str, Bool[np.ndarray, " n"]]) -> dict[str, Metric]:
    """Compute the rates of `selection_hits`, with CLIP_benchmark's names."""
    return {name: proportion(int(right.sum()), len(right)) for name, right in hits.items()}


def caption_ranks(
    z_image: Float[np.ndarray, "n *v d"],
    z_captions: Float[np.ndarray, "m d"],
    target: Int[np.ndarray, " n"],
    names: Sequence[str] | None = None,
) -> Int[np.ndarray, " n"]:
    """Count for each image the wrong captions that score at least as high as its own.

    Classes of one name, such as ImageNet's two called "missile", tie for every image. The first
    counts as ranked first, as in CLIP_benchmark; other ties count against the model.

    Raises:
        DataError: sizes that disagree, a target out of range, non-finite embeddings.
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
    z_query: Float[np.ndarray, "q *v d"],
    z_key: Float[np.ndarray, "m *w d"],
    pairs: Int[np.ndarray, "p 2"],
) -> Int[np.ndarray, " q"]:
    """Count for each query the wrong keys that score at least as high as its best correct key.

    Memory is bounded by one tile of similarities. A query without a correct key has rank -1.

    Args:
        z_query: query embeddings, unit norm.
        z_key: key embeddings, unit norm.
        pairs: (query index, key index) of the correct answers, any number per query.

    Raises:
        DataError: widths that disagree or an index out of range.
    """
    if (width := z_query.shape[-1]) != z_key.shape[-1]:
        raise DataError(
            f"embeddings of {width} and {z_key.shape[-1]} dimensions cannot be compared: encode "
            "both with the same model"
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
        np.maximum.at(best, query, _pair_cosines(z_query[query], z_key[key]))

    ranks = np.full(len(z_query), -1, np.int64)
    for q in range(0, len(z_query), QUERY_BLOCK):
        rows = slice(q, q + QUERY_BLOCK)
        first, last = np.searchsorted(pairs[:, 0], [q, q + QUERY_BLOCK])
        query, key = pairs[first:last].T
        rivals = np.zeros(len(best[rows]), np.int64)
        for k in range(0, len(z_key), KEY_BLOCK):
            tile = similarities(z_query[rows], z_key[k : k + KEY_BLOCK])
            here = (key >= k) & (key < k + KEY_BLOCK)
            tile[query[here] - q, key[here] - k] = -np.inf  # correct answers are not rivals
            rivals += (tile >= best[rows, None] - TIE).sum(axis=1)
        ranks[rows] = np.where(np.isfinite(best[rows]), rivals, -1)
    return ranks


def similarities(
    z_query: Float[np.ndarray, "q *v d"], z_key: Float[np.ndarray, "m *w d"]
) -> Float[np.ndarray, "q m"]:
    """Compute cosines of queries and keys; one of them may have several vectors each."""
    if z_key.ndim == 3:
        return similarities(z_key, z_query).T
    if z_query.ndim == 3:
        parts = (z_query[:, i] @ z_key.T for i in range(z_query.shape[1]))
        return functools.reduce(np.maximum, parts)
    return z_query @ z_key.T


def _pair_cosines(z_query: np.ndarray, z_key: np.ndarray) -> np.ndarray:
    """Compute the cosine of each row of `z_query` with the same row of `z_key`."""
    if z_key.ndim == 3:
        return _pair_cosines(z_key, z_query)
    if z_query.ndim == 3:
        return np.einsum("pvd,pd->pv", z_query, z_key).max(axis=1)
    return np.einsum("pd,pd->p", z_query, z_key)


def clusters(pairs: Int[np.ndarray, "p 2"], queries: int, keys: int) -> Int[np.ndarray, " queries"]:
    """Group the queries that have correct answers in common, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = (np.ones(len(pairs), bool), (pairs[:, 0], queries + pairs[:, 1]))
    graph = coo_array(edges, shape=(queries + keys,) * 2)
    return connected_components(graph, directed=False)[1][:queries]


def _embeddings(z: np.ndarray, name: str) -> np.ndarray:
    """Convert `z` to float32 (n, d) or (n, v, d), or raise a DataError."""
    z = np.asarray(z, np.float32)
    if z.ndim not in (2, 3) or not z.size:
        raise DataError(f"{name} must be (n, d) and not empty, not of shape {z.shape}")
    finite = np.isfinite(z).all(axis=tuple(range(1, z.ndim)))
    if not finite.all():
        raise DataError(
            f"{name} has {(~finite).sum()} of {len(z)} rows that are not finite, the first at "
            f"{np.argmin(finite)}: check the model's weights or lower the learning rate"
        )
    return z


def _pairs(pairs: np.ndarray) -> np.ndarray:
    """Convert `pairs` to integers (p, 2), or raise a DataError."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise DataError(f"positives must be integer pairs (p, 2), not {pairs.dtype}{pairs.shape}")
    return pairs


def checked_target(target: np.ndarray, n: int, m: int) -> np.ndarray:
    """Check that `target` is n indices below m, or raise a DataError."""
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
