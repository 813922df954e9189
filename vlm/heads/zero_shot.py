"""Zero-shot classification: labels are sentences, and the nearest sentence wins."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from vlm.errors import ConfigError, DataError
from vlm.heads import show
from vlm.heads.prompts import TEMPLATES, class_embeddings, class_prompts
from vlm.inputs.opening import OnError, one_or_many

Rule = Literal["softmax", "sigmoid"]

SHOWN = 12  # pictures that a result keeps to show in a notebook


@dataclass(frozen=True, repr=False)
class Classification:
    """What a classifier says of n images over m labels.

    Attributes:
        labels: the m names, in the order of the columns.
        logits: (n, m), scale * cosine + bias.
        rule: "softmax": scores of an image sum to one. "sigmoid": each score stands alone, and
            all may be small when no label fits (SigLIP, arXiv:2303.15343).
    """

    labels: tuple[str, ...]
    logits: Float[np.ndarray, "n m"]
    rule: Rule
    images: tuple[Any, ...] = field(default=(), compare=False)  # the first few, for display

    @property
    def scores(self) -> Float[np.ndarray, "n m"]:
        """The logits as probabilities, by the rule that the model was trained with."""
        return to_scores(self.logits, self.rule)

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k best (label, score), best first; all labels if there are fewer.

        Raises:
            ConfigError: a k below 1.
        """
        if k < 1:
            raise ConfigError(f"k is {k}: ask for at least the first label")
        order = np.argsort(-self.logits, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(self.scores, order, axis=1)
        return [
            [(self.labels[j], float(s)) for j, s in zip(row, values, strict=True)]
            for row, values in zip(order, scores, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        head = f"Classification of {len(self)} images over {len(self.labels)} labels ({self.rule})"
        lines = [
            f"  {i}: " + ", ".join(f"{label} {score:.3f}" for label, score in row)
            for i, row in enumerate(self._first().top(3))
        ]
        if len(self) > SHOWN:
            lines.append(f"  ... and {len(self) - SHOWN} more")
        return "\n".join([head, *lines])

    def _repr_html_(self) -> str:
        # A row of a result that kept no pictures is shown all the same.
        pictures = [show.thumbnail(image) for image in self.images]
        rows = itertools.zip_longest(pictures, self._first().top(5), fillvalue="")
        cards = "".join(show.card(picture, show.bars(row)) for picture, row in rows)
        more = f"<p>and {len(self) - SHOWN} more images</p>" if len(self) > SHOWN else ""
        return f"<div>{cards}{more}</div>"

    def _first(self) -> "Classification":
        return Classification(self.labels, self.logits[:SHOWN], self.rule)


class ZeroShotClassifier:
    """Classifies images into labels named in words (Radford et al., 2021, arXiv:2103.00020).

    Args:
        model: what `vlm.load` gives.
        labels: names that go into the templates, or a mapping from label to its own sentences.
        templates: sentences in which `{}` stands for the label; their embeddings are averaged.

    Raises:
        ConfigError: no labels, a label twice, a template without `{}`.
    """

    def __init__(
        self,
        model: Any,
        labels: Sequence[str] | Mapping[str, Sequence[str]],
        templates: Sequence[str] = TEMPLATES["photo"],
    ):
        self.model = model
        self.prompts = class_prompts(labels, templates)
        self.labels = tuple(self.prompts)
        self.z_labels = class_embeddings(model, self.prompts)

    def __call__(
        self, images: Any, batch_size: int | None = None, *, on_error: OnError | None = None
    ) -> Classification:
        """Classify one image or any iterable of them: PIL images, paths or arrays of pixels.

        A stream is encoded in bounded memory; the logits of all images are kept. `on_error` is told
        of each image that cannot be read, which then has no row: see `Bundle.encode_image`.
        """
        z_image, first = encode_images(self.model, images, batch_size, on_error)
        return Classification(self.labels, self.logits(z_image), self.model.loss, first)

    classify = __call__

    def logits(self, z_image: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n m"]:
        """The logits of embeddings over the labels: one matrix product."""
        logits = self.model.logit_scale * (z_image @ self.z_labels.T) + self.model.logit_bias
        return logits.astype(np.float32)

    def __repr__(self) -> str:
        names = ", ".join(self.labels[:4]) + (", ..." if len(self.labels) > 4 else "")
        return f"ZeroShotClassifier({self.model.name}, {len(self.labels)} labels: {names})"


def to_scores(logits: Float[np.ndarray, "*n m"], rule: Rule) -> Float[np.ndarray, "*n m"]:
    """Probabilities from logits: softmax over the labels, or an independent sigmoid for each.

    Raises:
        ConfigError: a rule that is neither.
    """
    logits = np.asarray(logits, np.float32)
    if rule == "softmax":
        exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)
    if rule == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))  # no overflow at either end
    raise ConfigError(f"the score rule is {rule!r}: it must be 'softmax' or 'sigmoid'")


def encode_images(
    model: Any, images: Any, batch_size: int | None = None, on_error: OnError | None = None
) -> tuple[Float[np.ndarray, "n d"], tuple[Any, ...]]:
    """The embeddings of a stream of images, and its first few images to show.

    Raises:
        ConfigError: no images.
    """
    first: dict[int, Any] = {}

    def watched(stream: Iterator[Any]) -> Iterator[Any]:
        for number, image in enumerate(stream):
            if len(first) < SHOWN:
                first[number] = image
            yield image

    def leave_out(number: int, error: DataError) -> None:
        first.pop(number, None)
        on_error(number, error)

    stream = one_or_many(images)
    head = list(itertools.islice(stream, 1))
    if not head:
        raise ConfigError("there are no images: give at least one")
    options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    if on_error is not None:
        options["on_error"] = leave_out
    z_image = model.encode_image(watched(itertools.chain(head, stream)), **options)
    return np.asarray(z_image, np.float32), tuple(first.values())
