"""Accuracy of few-shot heads by the number of labelled images per class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from vlm.errors import DataError
from vlm.evaluation.charts import Line, line_chart, percent
from vlm.evaluation.intervals import (
    Metric,
    between,
    clustered_proportion,
    interval,
    student,
)
from vlm.heads.few_shot import Method, fit_head

SHOTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Curve:
    """Accuracy of few-shot heads.

    Attributes:
        zero_shot: accuracy without labelled images.
        points: accuracy by method and shots; n is the number of images times rounds.
    """

    zero_shot: Metric
    points: dict[str, dict[int, Metric]]

    def svg(
        self, title: str = "Accuracy by labelled images per class", standalone: bool = False
    ) -> str:
        """Draw the chart; `standalone` includes the styles that a page otherwise has."""
        shots = sorted({k for row in self.points.values() for k in row})
        lines = [Line("zero-shot", shots, [self.zero_shot.value] * len(shots))]
        for color, (method, row) in enumerate(self.points.items(), 1):
            lines.append(Line.of_metrics(method, shots, [row[k] for k in shots], color))
        return line_chart(lines, title, "labelled images", percent, standalone=standalone)

    def _repr_html_(self) -> str:
        return self.svg(standalone=True)


def accuracy_by_shots(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    prior: Float[np.ndarray, "d m"],
    scale: float,
    methods: Sequence[Method] = ("linear", "mean", "anchored", "cache"),
    shots: Sequence[int] = SHOTS,
    rounds: int = 3,
    seed: int = 0,
    groups: Int[np.ndarray, " n"] | None = None,
) -> Curve:
    """Measure top-1 on half of the images, after training on some of the other half.

    Args:
        z_image: embeddings, unit norm.
        target: classes of the images.
        prior: zero-shot weights: the logit scale times the embeddings of the classes.
        scale: the logit scale.
        methods: of `fit_head`.
        shots: numbers of labelled images per class; a class with fewer gives all of them.
        rounds: random draws; the halves are fixed.
        seed: of the halves and the draws.
        groups: a group index per image, equal for copies (`vlm.adaptation.Labelled.groups`). Copies
            stay in one half and count as one labelled image. None: no copies.

    Raises:
        DataError: a class without a training image.

    Example:
        >>> random = np.random.default_rng(0)
        >>> target = np.arange(40) % 2
        >>> z = np.eye(8)[target] + random.normal(0, 0.1, (40, 8))
        >>> z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
        >>> prior = 10 * np.eye(8, 2, dtype=np.float32)
        >>> curve = vlm.evaluation.accuracy_by_shots(z, target, prior, 10.0, ("mean",), (1, 2))
        >>> curve.points["mean"][2].value
        1.0
    """
    rng = np.random.default_rng(seed)
    owner = np.unique(np.arange(len(target)) if groups is None else groups, return_inverse=True)[1]
    position = np.argsort(rng.permutation(owner.max() + 1))[owner]
    order = np.argsort(position, kind="stable")
    half = np.sum(position[order] < (owner.max() + 1) // 2)
    train, test = order[:half], order[half:]
    classes = prior.shape[1]
    own = [train[target[train] == c] for c in range(classes)]
    if not all(map(len, own)):
        raise DataError(f"class {[len(o) for o in own].index(0)} has no training image")
    right = (z_image[test] @ prior).argmax(1) == target[test]
    zero_shot = clustered_proportion(right, owner[test])
    hits: dict[tuple[str, int], list[np.ndarray]] = {}
    for _ in range(rounds):
        drawn = [_distinct(rng.permutation(o), owner) for o in own]
        for k in shots:
            chosen = np.concatenate([o[:k] for o in drawn])
            for method in methods:
                head = fit_head(
                    z_image[chosen], target[chosen], method, None, prior, scale, classes
                )
                correct = np.asarray(head(z_image[test]).argmax(1) == target[test])
                hits.setdefault((method, k), []).append(correct)
    return Curve(
        zero_shot,
        {m: {k: over_draws(np.array(hits[m, k]), owner[test]) for k in shots} for m in methods},
    )


def over_draws(hits: Bool[np.ndarray, "rounds n"], owner: Int[np.ndarray, " n"]) -> Metric:
    """Compute the proportion of hits with its interval over images and draws.

    The two margins add up in squares, each with its quantile of Student's t, so few rounds widen
    the interval.
    """
    rounds, n = hits.shape
    groups, p = np.tile(owner, rounds), float(hits.mean())
    draws = 0.0
    if rounds > 1:
        rest = hits - hits.mean(axis=0) - hits.mean(axis=1, keepdims=True) + p
        chance = float((rest**2).sum()) / max(n - 1, 1) / (rounds - 1) / n  # of images in a draw
        draws = max(0.0, float(hits.mean(axis=1).var(ddof=1)) - chance) / rounds
    if not draws:
        return clustered_proportion(hits.ravel(), groups)
    images, freedom = between(hits.ravel() - p, groups)
    both = images + draws
    margin = student(freedom) ** 2 * images + student(rounds - 1) ** 2 * draws
    worth = min(n * rounds, p * (1 - p) / both)
    return interval(p, worth, math.sqrt(margin / both), n * rounds)


def _distinct(rows: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return the first row of each owner."""
    return rows[np.sort(np.unique(owner[rows], return_index=True)[1])]
