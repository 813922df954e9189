"""k-nearest-neighbour classification with the labels or captions of an index.

Combined with a zero-shot classifier, it is retrieval-augmented classification (Long et al., 2022,
arXiv:2202.11233; Iscen et al., 2023, arXiv:2306.07196).
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from vlm import display
from vlm._deprecation import rename_arguments
from vlm.errors import ConfigError, check_choice
from vlm.heads.prompts import normalise
from vlm.heads.retrieval import RetrievalIndex
from vlm.heads.zero_shot import Embeddings, ImageClassifier, ZeroShotClassifier, to_scores

Evidence = Literal["label", "caption"]


class NeighbourClassifier(ImageClassifier, display.FactSheet):
    """Classifier by the nearest items of an index (k-NN).

    Each of the k nearest items votes with a weight of exp(cosine / temperature), as in the k-NN
    evaluation of Wu et al., 2018 (arXiv:1805.01978). With a label column it votes for its label;
    with a caption column, for the classes whose prompts are near its caption.

    Args:
        index: images with a metadata column of labels or captions.
        column: the name of that column; items without a value do not vote.
        k: number of neighbours.
        zero_shot: a classifier to combine with; needed for captions, which have no class names.
        neighbour_weight: weight of the neighbours in the combined probability, 0 to 1; the
            classifier has the rest.
        temperature: of the votes.

    Raises:
        ConfigError: an empty index, no such column, captions without `zero_shot`, a label that
            `zero_shot` does not have, a weight outside 0 to 1, a temperature or k that is not
            positive.

    Example:
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures, metadata={"label": ["red", "green", "blue"]})
        >>> classify = vlm.NeighbourClassifier(index, "label", k=1)
        >>> [row[0][0] for row in classify(pictures).top(1)]
        ['red', 'green', 'blue']
    """

    @rename_arguments(share="neighbour_weight")
    def __init__(
        self,
        index: RetrievalIndex,
        column: str,
        k: int = 20,
        zero_shot: ZeroShotClassifier | None = None,
        neighbour_weight: float = 0.5,
        temperature: float = 0.07,
        evidence: Evidence = "label",
    ):
        if not len(index):
            raise ConfigError("the index is empty: add items to find neighbours in")
        if column not in index.columns:
            known = ", ".join(sorted(index.columns)) or "none"
            raise ConfigError(f"the index has no metadata column {column!r}; it has {known}")
        if k < 1 or not temperature > 0 or not 0 <= neighbour_weight <= 1:
            raise ConfigError(
                f"k {k}, temperature {temperature} and neighbour_weight {neighbour_weight}: k is "
                "at least 1, the temperature above 0, the weight from 0 to 1"
            )
        self.model, self.index, self.column, self.k = index.model, index, column, k
        self.zero_shot, self.temperature = zero_shot, temperature
        self.neighbour_weight = neighbour_weight
        values = dict(zip(index.ids, index.columns[column], strict=True))
        values = {name: str(value) for name, value in values.items() if value not in (None, "")}
        if not values:
            raise ConfigError(f"the metadata column {column!r} has no values: neighbours need some")
        check_choice("evidence", evidence, get_args(Evidence))
        if evidence == "caption":
            if zero_shot is None:
                raise ConfigError("captions name no classes: give a zero_shot classifier too")
            self.labels = zero_shot.labels
            self._votes = _caption_votes(zero_shot, values)
        else:
            names = sorted(set(values.values()))
            self.labels = tuple(names) if zero_shot is None else zero_shot.labels
            at = {label: i for i, label in enumerate(self.labels)}
            for label in names:
                if label not in at:
                    raise ConfigError(
                        f"label {label!r} of column {column!r} is none of the classifier's: "
                        "name it there, or leave it out of the index"
                    )
            eye = np.eye(len(self.labels), dtype=np.float32)
            self._votes = {name: eye[at[label]] for name, label in values.items()}

    def logits(self, z_image: Float[Embeddings, "n d"]) -> Float[np.ndarray, "n m"]:
        """Compute the log of the combined probabilities of image embeddings."""
        z_image = np.asarray(z_image)
        votes = self.votes(z_image)
        if self.zero_shot is not None:
            zero_shot = to_scores(self.zero_shot.logits(z_image), "softmax")
            weight = self.neighbour_weight
            votes = weight * votes + (1 - weight) * zero_shot
        return np.log(np.maximum(votes, 1e-12)).astype(np.float32)

    def votes(self, z_image: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n m"]:
        """Compute the votes of the neighbours, as probabilities."""
        voters = set(self._votes)
        values = self.index.columns[self.column]
        known = [value not in (None, "") for value in values]
        where = None if all(known) else (lambda columns: _has_value(columns[self.column]))
        out = np.zeros((len(z_image), len(self.labels)), np.float32)
        found: Any = self.index.search(z_image, self.k, where=where)  # a list
        for row, hits in zip(out, found, strict=True):
            scores = np.array([hit.score for hit in hits if hit.id in voters])
            weights = np.exp((scores - scores.max(initial=-1)) / self.temperature)
            for weight, hit in zip(weights, (h for h in hits if h.id in voters), strict=True):
                row += weight / weights.sum() * self._votes[hit.id]
        return out

    def __repr__(self) -> str:
        joined = (
            "" if self.zero_shot is None else f" and zero-shot ({1 - self.neighbour_weight:.0%})"
        )
        return f"NeighbourClassifier({len(self.labels)} labels, {self.k} neighbours{joined})"

    def _facts(self) -> tuple[str, dict[str, str]]:
        own = f"{self.neighbour_weight:.0%}" if self.zero_shot is not None else "100%"
        return "Classifier by nearest neighbours", {
            "model": str(self.model.name),
            "labels": display.listed(self.labels),
            "neighbours": f"{self.k} of {len(self.index):,}, weight {own}",
        }


def _caption_votes(zero_shot: ZeroShotClassifier, texts: dict[Any, str]) -> dict[Any, np.ndarray]:
    """Compute for each item the class probabilities of its caption, by the classifier's prompts."""
    captions: Sequence[str] = list(dict.fromkeys(texts.values()))
    z = normalise(zero_shot.model.encode_text(list(captions)), "the embedding of a caption")
    votes = dict(zip(captions, to_scores(zero_shot.logits(z), "softmax"), strict=True))
    return {name: votes[caption] for name, caption in texts.items()}


def _has_value(column: np.ndarray) -> np.ndarray:
    if column.dtype.kind == "f":
        return ~np.isnan(column)
    return np.asarray([value not in (None, "") for value in column.tolist()], bool)
