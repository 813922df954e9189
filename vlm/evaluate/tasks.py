"""Tasks: what is asked of a model, and over which data. A task measures; the runner records."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from vlm.errors import ConfigError
from vlm.evaluate.metrics import Metric, pair_retrieval_metrics, zero_shot_metrics
from vlm.heads.prompts import TEMPLATES, check_templates, class_embeddings


@dataclass(frozen=True)
class DataInfo:
    """Where examples come from, precisely enough to find them again."""

    name: str
    version: str = ""
    split: str = ""

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        split = f" [{self.split}]" if self.split else ""
        return f"{self.name}{version}{split}"


@dataclass(frozen=True, eq=False)
class ZeroShotTask:
    """Choose each image's caption, or class, among all of them: top-k accuracy.

    Args:
        images: PIL images, paths or arrays of pixels; a stream is fine, and is read once.
        captions: every caption or class name there is to choose from, each once.
        target: for each image, the index of its caption.
        data: where the images come from.
        templates: sentences around a caption; the caption alone by default.
        ks: the k of top-k.
        name: of the task in a report.

    Raises:
        ConfigError: a caption given twice (its images could never be right), a bad template.
    """

    images: Iterable[Any]
    captions: Sequence[str]
    target: Sequence[int] | Int[np.ndarray, "n"]
    data: DataInfo
    templates: Sequence[str] = TEMPLATES["plain"]
    ks: Sequence[int] = (1, 5)
    name: str = "zero-shot"

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

    def measure(self, model: Any) -> dict[str, Metric]:
        """`top1`, `top5`, ... of the model."""
        z_captions = class_embeddings(model, self.captions, self.templates)
        z_image = model.encode_image(self.images)
        return zero_shot_metrics(z_image, z_captions, np.asarray(self.target), self.ks)


@dataclass(frozen=True, eq=False)
class RetrievalTask:
    """Find the texts of an image and the images of a text: recall at k in both directions.

    Args:
        images: PIL images, paths or arrays of pixels; a stream is fine, and is read once.
        texts: the sentences.
        data: where the pairs come from.
        positives: (image index, text index) of every right pair; None pairs row i with row i.
        ks: the k of recall at k.
        name: of the task in a report.
    """

    images: Iterable[Any]
    texts: Sequence[str]
    data: DataInfo
    positives: Sequence[tuple[int, int]] | None = None
    ks: Sequence[int] = (1, 5, 10)
    name: str = "retrieval"

    templates = TEMPLATES["plain"]  # the texts are whole sentences already

    def measure(self, model: Any) -> dict[str, Metric]:
        """`image_to_text_R@1`, ..., `text_to_image_R@10` of the model."""
        z_text = model.encode_text(list(self.texts))
        z_image = model.encode_image(self.images)
        positives = None if self.positives is None else np.asarray(self.positives)
        return pair_retrieval_metrics(z_image, z_text, positives, self.ks)
