"""Evaluation tasks: classification, retrieval and caption selection on given data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vlm.data.class_names import described
from vlm.errors import ConfigError
from vlm.evaluation.classification import (
    calibration_error,
    mean_average_precision,
    mean_per_class_recall,
)
from vlm.evaluation.evidence import Hashing, Samples, digest
from vlm.evaluation.intervals import Metric, hit_rate
from vlm.evaluation.metrics import (
    best_ranks,
    caption_ranks,
    retrieval_ranks,
    selection_hits,
    selection_metrics,
    similarities,
)
from vlm.heads.encoder import Encoder
from vlm.heads.prompts import TEMPLATES, check_templates, class_embeddings, label_prompts
from vlm.heads.token_embeddings import image_vectors
from vlm.heads.zero_shot import to_scores

BLOCK = 1024  # images per matrix product


@dataclass(frozen=True)
class DataInfo:
    """Name, version and split of a data set.

    Example:
        >>> print(vlm.DataInfo("pets", version="1.0", split="test"))
        pets 1.0 [test]
    """

    name: str
    version: str = ""
    split: str = ""

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        split = f" [{self.split}]" if self.split else ""
        return f"{self.name}{version}{split}"


@dataclass(frozen=True)
class Measured:
    """Result of a task.

    Attributes:
        metrics: by name.
        samples: a row per query: rank (number of wrong answers as good), cluster and more.
        data_hash: of images and targets.
        texts_hash: of captions or class names.
    """

    metrics: dict[str, Metric]
    samples: Samples
    data_hash: str
    texts_hash: str


class _ClassTask:
    """Captions of a classification task and their sentences."""

    captions: Sequence[str]
    data: DataInfo
    templates: Sequence[str]
    names: Sequence[str] | None

    def __post_init__(self):
        check_templates(self.templates)
        seen: set[str] = set()
        for caption in self.captions:
            if caption in seen:
                raise ConfigError(
                    f"caption {caption!r} of {self.data} is given twice: images of either could "
                    "never be right, so list it once and point their targets at it"
                )
            seen.add(caption)

    @property
    def texts_hash(self) -> str:
        """Hash of the names, or else of the captions."""
        return digest(self.captions if self.names is None else self.names)

    @property
    def prompts(self) -> dict[str, tuple[str, ...]]:
        """Sentences of each caption."""
        return label_prompts(self.captions, self.names or self.captions, self.templates)

    @property
    def about(self) -> dict[str, str]:
        """Facts about the texts other than the templates."""
        changed = described(self.captions, self.names or self.captions)
        return {"class_names": changed} if changed else {}


@dataclass(frozen=True, eq=False)
class ZeroShotTask(_ClassTask):
    """Zero-shot classification: choose each image's caption among all; top-k accuracy.

    Args:
        images: PIL images, paths or arrays of pixels; a stream is read once.
        captions: all captions or class names, each once.
        target: caption index of each image.
        data: origin of the images.
        templates: sentences around a caption; the caption alone by default.
        ks: the k of top-k.
        name: of the task in a report.
        classes: the captions are classes of many images: also measure mean recall per class and
            calibration.
        z_captions: trained embeddings of the captions; by default the model's.
        image_at: function from index to image, for a page that shows some of them.
        names: class names in sentences; of two equal ones the first counts as ranked first.

    Raises:
        ConfigError: a caption given twice (its images could never be right), a bad template.

    Example:
        >>> data = vlm.DataInfo("colours")
        >>> task = vlm.ZeroShotTask(pictures, ["red", "green", "blue"], [0, 1, 2], data)
        >>> result = vlm.evaluation.evaluate(model, [task])[task.name]
        >>> result.metrics["top1"].n
        3
    """

    images: Iterable[Any]
    captions: Sequence[str]
    target: Sequence[int] | Int[np.ndarray, " n"]
    data: DataInfo
    templates: Sequence[str] = TEMPLATES["plain"]
    ks: Sequence[int] = (1, 5)
    name: str = "zero-shot"
    classes: bool = False
    z_captions: Float[np.ndarray, "m d"] | None = None
    image_at: Callable[[int], Any] | None = None
    names: Sequence[str] | None = None

    kind = "zeroshot_classification"  # as CLIP_benchmark calls it

    def measure(self, model: Encoder) -> Measured:
        """Measure `top1`, `top5`, ..., and more with `classes`."""
        names, z_captions = None, self.z_captions
        if z_captions is None:
            names = list(self.names or self.captions)
            z_captions = class_embeddings(model, self.prompts)
        images, target = Hashing(self.images), np.asarray(self.target)
        z_image = image_vectors(model, images)
        ranks = caption_ranks(z_image, z_captions, target, names)
        metrics = {f"top{k}": hit_rate(ranks, k) for k in self.ks}
        rows = np.arange(len(target))
        predicted, confidence = _best(model, z_image, z_captions)
        if names:
            first = {name: i for i, name in reversed(list(enumerate(names)))}  # of equal names
            predicted = np.array([first[name] for name in names])[predicted]
        if self.classes:
            metrics["mean_per_class_recall"] = mean_per_class_recall(ranks, target)
            metrics["calibration_error"] = calibration_error(confidence, predicted == target)
        samples = {
            "query": rows, "target": target, "predicted": predicted, "rank": ranks,
            "confidence": confidence, "cluster": rows,
        }  # fmt: skip
        return Measured(metrics, samples, images.digest(target), self.texts_hash)

    @property
    def about(self) -> dict[str, str]:
        """Facts about the texts other than the templates."""
        if self.z_captions is not None:
            return {"head": "a trained head in place of templates"}
        return super().about


@dataclass(frozen=True, eq=False)
class MultilabelTask(_ClassTask):
    """Multi-label classification: mean average precision over classes.

    Args:
        images: PIL images, paths or arrays of pixels; a stream is read once.
        captions: the classes, each once.
        relevant: for each image and class, whether the image shows it.
        data: origin of the images.
        templates: sentences around a class; the class alone by default.
        name: of the task in a report.
        names: class names in sentences.

    Example:
        >>> data = vlm.DataInfo("colours")
        >>> shown = np.eye(3, dtype=bool)
        >>> task = vlm.evaluation.MultilabelTask(pictures, ["red", "green", "blue"], shown, data)
        >>> list(vlm.evaluation.evaluate(model, [task])[task.name].metrics)
        ['mean_average_precision']
    """

    images: Iterable[Any]
    captions: Sequence[str]
    relevant: Bool[np.ndarray, "n m"]
    data: DataInfo
    templates: Sequence[str] = TEMPLATES["plain"]
    name: str = "multilabel"
    names: Sequence[str] | None = None

    kind = "zeroshot_classification"

    def measure(self, model: Encoder) -> Measured:
        """Measure `mean_average_precision`."""
        z_captions = class_embeddings(model, self.prompts)
        images = Hashing(self.images)
        z_image = image_vectors(model, images)
        metric = mean_average_precision(similarities(z_image, z_captions), self.relevant)
        ranks = best_ranks(z_image, z_captions, np.argwhere(self.relevant))
        rows = np.flatnonzero(ranks >= 0)  # images that show a class
        samples = {"query": rows, "rank": ranks[rows], "cluster": rows}
        shown = images.digest(self.relevant.astype(np.int64).ravel())
        return Measured({"mean_average_precision": metric}, samples, shown, self.texts_hash)


@dataclass(frozen=True, eq=False)
class RetrievalTask:
    """Retrieval of texts by image and images by text: recall at k in both directions.

    Args:
        images: PIL images, paths or arrays of pixels; a stream is read once.
        texts: the sentences.
        data: origin of the pairs.
        positives: (image index, text index) of every correct pair; None pairs row i with row i.
        ks: the k of recall at k.
        name: of the task in a report.
        image_at: function from index to image, for a page that shows some of them.

    Example:
        >>> texts = ["a red square", "a green square", "a blue square"]
        >>> task = vlm.RetrievalTask(pictures, texts, vlm.DataInfo("colours"), ks=(1, 3))
        >>> report = vlm.evaluation.evaluate(model, [task])
        >>> report[task.name].metrics["image_to_text_R@3"].value
        1.0
    """

    images: Iterable[Any]
    texts: Sequence[str]
    data: DataInfo
    positives: Sequence[tuple[int, int]] | None = None
    ks: Sequence[int] = (1, 5, 10)
    name: str = "retrieval"
    image_at: Callable[[int], Any] | None = None

    kind = "zeroshot_retrieval"
    templates = TEMPLATES["plain"]  # the texts are sentences

    def measure(self, model: Encoder) -> Measured:
        """Measure `image_to_text_R@1`, ..., `text_to_image_R@10`."""
        z_text = np.asarray(model.encode_text(list(self.texts)), np.float32)
        images = Hashing(self.images)
        z_image = image_vectors(model, images)
        pairs = None if self.positives is None else np.asarray(self.positives)
        directions = retrieval_ranks(z_image, z_text, pairs)
        metrics, parts = {}, []
        for d in directions:
            metrics |= {f"{d.name}_R@{k}": hit_rate(d.ranks, k, d.clusters) for k in self.ks}
            names = np.full(len(d.queries), d.name)
            parts.append((names, d.queries, d.ranks, *_nearest(d.z_query, d.z_key), d.clusters))
        columns = ["direction", "query", "rank", "found", "score", "cluster"]
        samples = dict(zip(columns, map(np.concatenate, zip(*parts, strict=True)), strict=True))
        if pairs is None:
            pairs = np.repeat(np.arange(len(z_image))[:, None], 2, axis=1)
        return Measured(metrics, samples, images.digest(pairs.ravel()), digest(self.texts))


@dataclass(frozen=True, eq=False)
class SelectionTask:
    """Selection of the caption of an image among a few that differ in one detail.

    Winoground and SugarCrepe are such tasks.

    Args:
        images: the images of each instance, the same number in all.
        texts: the captions of each instance; image j belongs to caption j.
        data: origin of the instances.
        name: of the task in a report.

    Example:
        >>> images = [[pictures[0], pictures[2]]]
        >>> texts = [["a red square", "a blue square"]]
        >>> task = vlm.SelectionTask(images, texts, vlm.DataInfo("colours"))
        >>> len(vlm.evaluation.evaluate(model, [task]).results)
        1
    """

    images: Iterable[Sequence[Any]]
    texts: Sequence[Sequence[str]]
    data: DataInfo
    name: str = "selection"

    kind = "image_caption_selection"
    templates = TEMPLATES["plain"]

    def measure(self, model: Encoder) -> Measured:
        """Measure `image_acc`, `text_acc` and `acc`."""
        count, texts = len(self.texts), [text for own in self.texts for text in own]
        images = Hashing(image for own in self.images for image in own)
        z_image = image_vectors(model, images)
        z_text = np.asarray(model.encode_text(texts), np.float32)
        if not count or len(z_image) % count or len({len(own) for own in self.texts}) > 1:
            raise ConfigError(
                f"{self.data}: {count} instances with {len(z_image)} images and {len(z_text)} "
                "captions: give each the same number of both"
            )
        hits = selection_hits(*(z.reshape(count, -1, *z.shape[1:]) for z in (z_image, z_text)))
        rows = np.arange(count)
        samples = {"query": rows, "cluster": rows, "rank": 1 - hits["acc"].astype(np.int64), **hits}
        return Measured(selection_metrics(hits), samples, images.digest(), digest(texts))


Task = ZeroShotTask | MultilabelTask | RetrievalTask | SelectionTask


def _nearest(z_query: np.ndarray, z_key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest key of each query and its cosine, a block of queries at a time."""
    nearest, score = np.empty(len(z_query), np.int64), np.empty(len(z_query), np.float32)
    for start in range(0, len(z_query), BLOCK):
        block = slice(start, start + BLOCK)
        cosines = similarities(z_query[block], z_key)
        nearest[block], score[block] = cosines.argmax(axis=1), cosines.max(axis=1)
    return nearest, score


def _best(
    model: Encoder, z_image: np.ndarray, z_captions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best caption of each image and its score, a block of images at a time."""
    predicted, confidence = [], []
    scale, bias = getattr(model, "logit_scale", 1.0), getattr(model, "logit_bias", 0.0)
    for start in range(0, len(z_image), BLOCK):
        logits = scale * similarities(z_image[start : start + BLOCK], z_captions) + bias
        predicted.append(logits.argmax(axis=1))
        confidence.append(to_scores(logits, getattr(model, "loss", "softmax")).max(axis=1))
    return np.concatenate(predicted), np.concatenate(confidence)
