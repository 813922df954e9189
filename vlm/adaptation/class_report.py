"""Accuracy by class, confusions and confident mistakes of an adapted model, for its page."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm import display
from vlm.errors import DataError
from vlm.evaluation.charts import MAX_CLASSES, confusion_chart
from vlm.evaluation.classification import confusion
from vlm.evaluation.intervals import Metric, proportion

MISTAKES, CONFUSIONS, FEW_CLASSES = 24, 12, 20  # shown at most
SIDE = 120  # pixels of a thumbnail


class ClassRow(NamedTuple):
    """Accuracy of a class: its images that are classified right, and its main confusion."""

    name: str
    accuracy: Metric
    taken_for: str


class Mistake(NamedTuple):
    """A wrongly classified image."""

    picture: str  # a data URI
    file: str
    target: str
    predicted: str
    confidence: float


@dataclass(frozen=True, eq=False)
class ClassReport:
    """Predictions of the chosen method.

    Attributes:
        split: of the images: "test" or "validation".
        names: classes.
        target, predicted: class of each image.
        confidence: score of the prediction.
        images: as in `Labelled`.
    """

    split: str
    names: tuple[str, ...]
    target: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]
    images: Sequence[Any] = field(repr=False)

    def rows(self) -> list[ClassRow]:
        """Return the classes that have images, the least accurate first."""
        counts = self._counts()
        rows = []
        for number in np.flatnonzero(counts.sum(1)):
            own = counts[number].copy()
            right, total = int(own[number]), int(own.sum())
            own[number] = 0
            worst = int(own.argmax())
            taken_for = f"{self.names[worst]} ({own[worst]:,})" if own[worst] else ""
            rows.append(ClassRow(self.names[number], proportion(right, total), taken_for))
        return sorted(rows, key=lambda row: (row.accuracy.value, -row.accuracy.n, row.name))

    def confusions(self) -> list[tuple[str, str, int, int]]:
        """Return (class, predicted class, images, images of the class), the most images first."""
        wrong = self.predicted != self.target
        if not wrong.any():
            return []
        pairs = np.stack([self.target[wrong], self.predicted[wrong]])
        pairs, count = np.unique(pairs, axis=1, return_counts=True)
        sizes = np.bincount(self.target, minlength=len(self.names))
        order = np.argsort(-count, kind="stable")[:CONFUSIONS]
        return [
            (self.names[i], self.names[j], int(count[at]), int(sizes[i]))
            for at, (i, j) in zip(order, pairs.T[order].tolist(), strict=True)
        ]

    def mistakes(self) -> list[Mistake]:
        """Return the most confident mistakes; images that cannot be read are left out."""
        wrong = np.flatnonzero(self.predicted != self.target)
        wrong = wrong[np.argsort(-self.confidence[wrong], kind="stable")]
        found = []
        for i in wrong[:MISTAKES].tolist():
            try:
                picture = display.data_uri(self.images[i], SIDE)
            except (DataError, OSError, ValueError):
                continue
            image = self.images[i]
            file = os.path.basename(image) if isinstance(image, str | os.PathLike) else ""
            names = self.names[self.target[i]], self.names[self.predicted[i]]
            found.append(Mistake(picture, file, *names, float(self.confidence[i])))
        return found

    def matrices(self) -> list[tuple[str, str]]:
        """Return titled confusion matrices: of all classes, and of those with most errors."""
        if len(self.names) <= MAX_CLASSES:
            return [("", confusion_chart(self.predicted, self.target, self.names))]
        return [
            (
                f"The {MAX_CLASSES} classes of the most frequent mistakes",
                confusion_chart(self.predicted, self.target, self.names),
            ),
            (
                f"All {len(self.names):,} classes",
                confusion_chart(self.predicted, self.target, most=len(self.names)),
            ),
        ]

    def _counts(self) -> Int[np.ndarray, "m m"]:
        return confusion(self.predicted, self.target, len(self.names))
