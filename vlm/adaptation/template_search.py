"""Search for prompt templates that suit a data set, with a few labelled images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vlm.adaptation.labelled import embed_labelled
from vlm.errors import ConfigError
from vlm.evaluation.intervals import Metric, proportion
from vlm.heads.encoder import Encoder
from vlm.heads.inputs import Images
from vlm.heads.prompts import TEMPLATES, check_templates, class_embeddings
from vlm.heads.templates import choose_templates

POOL = tuple(dict.fromkeys(t for own in TEMPLATES.values() for t in own))
FOLDS = 5
MAX_TEMPLATES = 8  # in an ensemble


@dataclass(frozen=True)
class TemplateSearch:
    """Result of a search.

    Attributes:
        templates: the chosen templates, the most useful first.
        accuracy: cross-validated top-1 of the search.
        before: top-1 of the initial templates on the same images.

    Example:
        >>> labels, pool = ["red", "green", "blue"] * 4, ["a {} square."]
        >>> result = vlm.adaptation.search_templates(model, pictures * 4, labels, pool=pool)
        >>> len(result.templates) >= 1
        True
    """

    templates: tuple[str, ...]
    accuracy: Metric
    before: Metric


def search_templates(
    model: Encoder,
    images: Images,
    labels: Sequence[str],
    classes: Sequence[str] | None = None,
    pool: Sequence[str] = POOL,
    start: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> TemplateSearch:
    """Find the templates of a pool whose mean embedding fits labelled images best.

    Greedy forward selection by likelihood, as accuracy hardly changes on few images. The number of
    templates is chosen by cross-validation; `start` is kept unless the search is clearly better on
    held-out images. Do not search on a test set.

    Args:
        model: a model from `vlm.load`.
        images: PIL images, paths or arrays of pixels, any iterable; or their embeddings, (n, d).
        labels: class of each image.
        classes: all class names; by default those of `labels`, sorted.
        pool: sentences with `{}` for the label, in addition to `start`.
        start: initial templates; by default the model's own, else "a photo of a {}.".
        seed: of the folds.
        batch_size: for encoding; None: the model's default.

    Raises:
        ConfigError: labels that are no classes or not one per image, fewer than two images, a
            template without `{}`.

    Example:
        >>> labels, pool = ["red", "green", "blue"] * 4, ["a {} square."]
        >>> result = vlm.adaptation.search_templates(model, pictures * 4, labels, pool=pool)
        >>> set(result.templates) <= {"a photo of a {}.", "a {} square."}
        True
    """
    z_image, names, target = embed_labelled(model, images, list(labels), classes, batch_size)
    start = choose_templates(start, model)
    return search_by_embeddings(model, z_image, target, names, pool, start, seed)


def search_by_embeddings(
    model: Encoder,
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    names: Sequence[str],
    pool: Sequence[str] = POOL,
    start: Sequence[str] = TEMPLATES["photo"],
    seed: int = 0,
    groups: Int[np.ndarray, " n"] | None = None,
) -> TemplateSearch:
    """Search templates with embeddings of images and their class indices.

    Images of one group in `groups`, such as copies, share a fold.
    """
    check_templates(pool)
    check_templates(start)
    if len(z_image) < 2:
        raise ConfigError("one image is not enough to search templates: give at least two")
    sentences = list(dict.fromkeys([*start, *pool]))
    z = np.stack([class_embeddings(model, names, [sentence]) for sentence in sentences])
    scores = _Scores(z, z_image, target, model.logit_scale)
    initial = list(range(len(dict.fromkeys(start))))
    owner = np.arange(len(z_image))
    if groups is not None and np.ptp(groups):
        owner = np.unique(groups, return_inverse=True)[1]
    count = int(owner.max()) + 1
    folds = np.random.default_rng(seed).permutation(count)[owner] % min(FOLDS, count)
    logp = np.zeros((MAX_TEMPLATES, len(z_image), len(names)))
    for fold in range(folds.max() + 1):
        seen, unseen = folds != fold, folds == fold
        order = scores.greedy(seen)
        for k in range(MAX_TEMPLATES):
            logp[k, unseen] = scores.log_probabilities(order[: k + 1], unseen)
    all_images = np.ones(len(z_image), bool)
    before = scores.log_probabilities(initial, all_images)
    own = np.arange(len(target)), target
    k = int(logp[:, own[0], own[1]].sum(1).argmax())
    right, base = (rows.argmax(1) == target for rows in (logp[k], before))
    # A gain on few images may be chance: it must exceed its standard error. It is measured by
    # accuracy, as any average of sentences gains likelihood by being less confident.
    gained = right.astype(np.float64) - base
    kept = gained.mean() > gained.std(ddof=1) / np.sqrt(len(gained))
    chosen = scores.greedy(all_images)[: k + 1] if kept else initial
    return TemplateSearch(
        tuple(sentences[i] for i in chosen),
        proportion(int((right if kept else base).sum()), len(target)),
        proportion(int(base.sum()), len(target)),
    )


class _Scores:
    """Likelihoods of labelled images by the mean embedding of a set of templates."""

    def __init__(self, z: np.ndarray, z_image: np.ndarray, target: np.ndarray, scale: float):
        self._z, self._target, self._scale = z, target, scale  # z: (t, m, d)
        self._z_image = z_image
        self._cosines = np.einsum("nd,tmd->tnm", z_image, z)

    def log_probabilities(self, chosen: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """Compute (n, m) log probabilities of some rows with the mean of the chosen templates."""
        length = np.linalg.norm(self._z[list(chosen)].sum(0), axis=1)
        return self._of(self._cosines[list(chosen)][:, rows].sum(0), length)

    def greedy(self, rows: np.ndarray) -> list[int]:
        """Order the templates, each time adding the one that helps these rows most."""
        chosen: list[int] = []
        z, cosines = np.zeros_like(self._z[0]), np.zeros_like(self._cosines[0][rows])
        own = np.arange(int(rows.sum())), self._target[rows]
        for _ in range(min(MAX_TEMPLATES, len(self._z))):
            found = {
                i: self._of(
                    cosines + self._cosines[i][rows], np.linalg.norm(z + self._z[i], axis=1)
                )[own].mean()
                for i in range(len(self._z))
                if i not in chosen
            }
            best = max(found, key=lambda i: (found[i], -i))
            chosen.append(best)
            z, cosines = z + self._z[best], cosines + self._cosines[best][rows]
        return chosen

    def _of(self, cosines: np.ndarray, length: np.ndarray) -> np.ndarray:
        logits = self._scale * cosines / np.maximum(length, 1e-12)
        top = logits.max(1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
