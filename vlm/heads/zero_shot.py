"""Zero-shot classification by the similarity of images and label prompts."""

import abc
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Group
from rich.padding import Padding

from vlm import display
from vlm._deprecation import rename_arguments
from vlm.errors import ConfigError, DataError, check_choice
from vlm.heads.classifier_file import reading_classifier, write_classifier
from vlm.heads.encoder import Encoder, Rule
from vlm.heads.inputs import Images
from vlm.heads.prompts import cached_embeddings, class_prompts, indices, leaves_of
from vlm.heads.templates import choose_templates
from vlm.heads.token_embeddings import image_vectors
from vlm.inputs.opening import OnError, one_or_many

Embeddings = np.ndarray | Array

NONE = "none of these"
FILE = "classifier.safetensors"  # file name of a run's classifier
KEY = "vlm zero-shot classifier"  # metadata key in a saved file
PRIOR = 0.5  # standard deviation of log temperature around 0: few labels move it little
SHOWN = 12  # images that a result keeps for display


@dataclass(frozen=True, repr=False)
class Classification:
    """Classification result of n images over m labels.

    Attributes:
        labels: the m names, in the order of the columns.
        logits: (n, m), scale * cosine + bias.
        rule: "softmax": scores of an image sum to one. "sigmoid": scores are independent, and all
            may be small when no label fits (SigLIP, arXiv:2303.15343).

    Example:
        >>> result = vlm.ZeroShotClassifier(model, ["cat", "dog"])(pictures)
        >>> result.scores.shape, result.scores.sum(axis=1).round(3).tolist()
        ((3, 2), [1.0, 1.0, 1.0])
        >>> result.grouped({"animal": ["cat", "dog"]}).labels
        ('animal',)
    """

    labels: tuple[str, ...]
    logits: Float[np.ndarray, "n m"]
    rule: Rule
    images: tuple[Any, ...] = field(default=(), compare=False)  # the first few, for display

    @property
    def scores(self) -> Float[np.ndarray, "n m"]:
        """Probabilities of the logits, by the rule."""
        return to_scores(self.logits, self.rule)

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return for each image the k best (label, score), best first; all if there are fewer.

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

    def above(self, threshold: float = 0.5) -> list[list[tuple[str, float]]]:
        """Return for each image all (label, score) of at least `threshold`, best first."""
        rows = self.top(len(self.labels))
        return [[pair for pair in row if pair[1] >= threshold] for row in rows]

    def grouped(self, groups: Mapping[str, Sequence[str]]) -> "Classification":
        """Combine labels into groups; a label in no group is kept.

        The probability of a group is the sum of its labels' for "softmax", and that of its best
        label for "sigmoid".

        Raises:
            ConfigError: an unknown label, or one in two groups.
        """
        columns: dict[str, list[int]] = {}
        at = {label: i for i, label in enumerate(self.labels)}
        left = dict(at)
        for group, members in groups.items():
            columns[group] = []
            for label in members:
                if label not in left:
                    why = "in two groups" if label in at else "none of the labels"
                    raise ConfigError(f"label {label!r} of group {group!r} is {why}")
                columns[group].append(left.pop(label))
        columns |= {label: [i] for label, i in left.items()}
        joined = [self.logits[:, members] for members in columns.values()]
        join = np.logaddexp.reduce if self.rule == "softmax" else np.max
        logits = np.stack([join(part, axis=1) for part in joined], axis=1)
        return Classification(tuple(columns), logits, self.rule, self.images)

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
        # Rows without a stored image are displayed too.
        pictures = [display.thumbnail(image) for image in self.images]
        rows = self._first().top(5)
        pictures += [""] * (len(rows) - len(pictures))
        cards = "".join(
            display.card(picture, display.bars(row))
            for picture, row in zip(pictures, rows, strict=True)
        )
        more = f"<p>and {len(self) - SHOWN} more images</p>" if len(self) > SHOWN else ""
        return f"<div>{cards}{more}</div>"

    def __rich__(self) -> Group:
        blocks = [Padding(display.bar_table(row), (0, 0, 1, 0)) for row in self._first().top(5)]
        more = [f"and {len(self) - SHOWN} more images"] if len(self) > SHOWN else []
        return Group(*blocks, *more)

    def _first(self) -> "Classification":
        return Classification(self.labels, self.logits[:SHOWN], self.rule)


class ImageClassifier(abc.ABC):
    """Base class of image classifiers; subclasses define `logits`.

    Attributes:
        model: the model that embeds images.
        labels: the m class names.
    """

    model: Encoder
    labels: tuple[str, ...]
    _multi_vector = False  # whether `logits` takes several vectors of an image

    @property
    def rule(self) -> Rule:
        """How logits become scores: "softmax", unless a subclass overrides it."""
        return "softmax"

    @abc.abstractmethod
    def logits(self, z_image: Embeddings) -> Embeddings:
        """Compute the logits (n, m) of embeddings (n, d)."""

    def __call__(
        self, images: Images, batch_size: int | None = None, *, on_error: OnError | None = None
    ) -> Classification:
        """Classify one image or any iterable of them: PIL images, paths or arrays of pixels.

        A stream is encoded in bounded memory; the logits of all images are kept. `on_error` is
        called for each unreadable image, which then has no row: see `Bundle.encode_image`.
        """
        z_image, first = encode_images(
            self.model, images, batch_size, on_error, multi_vector=self._multi_vector
        )
        return Classification(self.labels, np.asarray(self.logits(z_image)), self.rule, first)

    classify = __call__

    def __repr__(self) -> str:
        names = ", ".join(self.labels[:4]) + (", ..." if len(self.labels) > 4 else "")
        kind = type(self).__name__
        return f"{kind}({self._encoders()}, {len(self.labels)} labels: {names})"

    def _encoders(self) -> str:
        return self.model.name


class ZeroShotClassifier(ImageClassifier, display.FactSheet):
    """Zero-shot classifier by text prompts (Radford et al., 2021, arXiv:2103.00020).

    Args:
        model: a model from `vlm.load`.
        labels: names for the templates, or a mapping from label to its own sentences (None for the
            templates); nested mappings are a hierarchy, whose levels are in `groups`.
            `vlm.heads.labels.read_labels` reads them from files and data sets.
        templates: sentences with `{}` for the label; their embeddings are averaged. By default the
            model's own, else "a photo of a {}.": see `vlm.heads.templates`.
        other_label: prompts for an image that shows none of the labels, such as "a photo."; they
            add the label "none of these".
        multi_label: score labels independently. For a model of the softmax loss, each label is
            compared with `other_label` ("a photo." by default).

    With several vectors of an image (BLIP-2), its cosine is that of the most similar one.

    Attributes:
        groups: for each level of a hierarchy, from the top, its nodes and all labels under them;
            for `Classification.grouped`.
        temperature: divisor of the logits; see `calibrate`.

    Raises:
        ConfigError: no labels, a label twice, a template without `{}`.

    Example:
        >>> classify = vlm.ZeroShotClassifier(model, ["cat", "dog"], other_label="a photo.")
        >>> classify.labels
        ('cat', 'dog', 'none of these')
        >>> len(classify(pictures).top(1))
        3
    """

    _multi_vector = True

    @rename_arguments(none="other_label")
    def __init__(
        self,
        model: Encoder,
        labels: Sequence[str] | Mapping[str, Any],
        templates: Sequence[str] | None = None,
        other_label: Sequence[str] | str | None = None,
        multi_label: bool = False,
    ):
        if getattr(model, "prompts_by_video", False):
            raise ConfigError(
                f"text embeddings of {model.name} depend on the video: compare videos and texts "
                "with Bundle.video_logits(videos, texts)"
            )
        templates = choose_templates(templates, model)
        self.model, self.multi_label, self.temperature = model, multi_label, 1.0
        leaves, self.groups = leaves_of(labels, templates)
        self.prompts = class_prompts(leaves, templates)
        if other_label is None and multi_label and model.loss == "softmax":
            other_label = "a photo."
        if other_label is not None:
            if NONE in self.prompts:
                raise ConfigError(f"label {NONE!r} is what `other_label` adds: leave it out")
            own = {NONE: [other_label] if isinstance(other_label, str) else other_label}
            self.prompts |= class_prompts(own, templates)
        self.z_labels = cached_embeddings(model, self.prompts)
        # With multi_label, every label is compared with `other_label`.
        self._against = other_label is not None and multi_label and model.loss == "softmax"
        self.labels = tuple(self.prompts)[: -1 if self._against else None]

    @classmethod
    def of_embeddings(
        cls,
        model: Encoder,
        prompts: Mapping[str, Sequence[str]],
        z_labels: Float[np.ndarray, "m d"],
    ) -> "ZeroShotClassifier":
        """Make a classifier from trained label embeddings; `prompts` describe the labels.

        Raises:
            ConfigError: numbers of embeddings and labels that differ, or another width.
        """
        width = getattr(model, "embed_dim", z_labels.shape[-1])
        if z_labels.shape != (len(prompts), width):
            raise ConfigError(
                f"embeddings of shape {z_labels.shape} are not those of {len(prompts)} labels in "
                f"{width} dimensions: give one row for each label"
            )
        classifier = cls.__new__(cls)
        classifier.model, classifier.z_labels = model, np.asarray(z_labels, np.float32)
        classifier.prompts = {name: tuple(own) for name, own in prompts.items()}
        classifier.groups, classifier.multi_label = [], False
        classifier._against, classifier.temperature, classifier.labels = False, 1.0, tuple(prompts)
        return classifier

    @property
    def rule(self) -> Rule:
        """How logits become scores: "sigmoid" with `multi_label`, else the model's rule."""
        return "sigmoid" if self.multi_label else self.model.loss

    def calibrate(
        self, images: Images, labels: Sequence[str], batch_size: int | None = None
    ) -> "ZeroShotClassifier":
        """Fit the temperature on a few labelled images, so that scores are probabilities.

        The ranking of labels does not change. Returns the classifier itself.

        Raises:
            ConfigError: no images, another number of labels, or an unknown label.
        """
        z_image, _ = encode_images(self.model, images, batch_size, multi_vector=True)
        target = indices(labels, self.labels)
        if len(labels) != len(z_image):
            raise ConfigError(f"{len(z_image)} images and {len(labels)} labels: give one each")
        self.temperature = 1.0
        self.temperature = fit_temperature(self.logits(z_image), target, self.rule)
        return self

    @overload
    def logits(self, z_image: np.ndarray) -> np.ndarray: ...
    @overload
    def logits(self, z_image: Array) -> Array: ...
    def logits(self, z_image: Float[Embeddings, "n *v d"]) -> Float[Embeddings, "n m"]:
        """Compute the logits of embeddings over the labels; works inside `jit`."""
        cosines = z_image @ self.z_labels.T
        cosines = cosines.max(1) if cosines.ndim == 3 else cosines
        logits = self.model.logit_scale * cosines + self.model.logit_bias
        if self._against:
            logits = logits[:, :-1] - logits[:, -1:]
        return (logits / self.temperature).astype(np.float32)

    def save(self, file: str | os.PathLike) -> None:
        """Write the classifier to a `.safetensors` file: its embeddings, and how they were made."""
        about = {
            "prompts": self.prompts,
            "groups": self.groups,
            "multi_label": self.multi_label,
            "against": self._against,
            "temperature": self.temperature,
        }
        write_classifier(file, KEY, self.model, about, {"z_labels": self.z_labels})

    @classmethod
    def load(cls, file: str | os.PathLike, model: Encoder) -> "ZeroShotClassifier":
        """Load a classifier that `save` wrote; only probes of the model's identity are encoded.

        Raises:
            CheckpointError: no such file, another file, or one of another model.
        """
        classifier = cls.__new__(cls)
        with reading_classifier(file, KEY, model) as (about, tensors):
            classifier.model, classifier.z_labels = model, tensors["z_labels"]
            classifier.prompts = {name: tuple(own) for name, own in about["prompts"].items()}
            classifier.groups, classifier.multi_label = about["groups"], about["multi_label"]
            classifier._against, classifier.temperature = about["against"], about["temperature"]
            if len(classifier.z_labels) != len(classifier.prompts):
                raise ValueError("the numbers of embeddings and labels differ")
        classifier.labels = tuple(classifier.prompts)[: -1 if classifier._against else None]
        return classifier

    def _facts(self) -> tuple[str, dict[str, str]]:
        return "Zero-shot classifier", {
            "model": str(self.model.name),
            "labels": display.listed(self.labels),
            "sentences": display.listed([s for own in self.prompts.values() for s in own], 3),
            "scores by": self.rule,
            "temperature": f"{self.temperature:.3g}",
        }


def to_scores(logits: Float[np.ndarray, "*n m"], rule: Rule) -> Float[np.ndarray, "*n m"]:
    """Convert logits to probabilities: softmax over the labels, or independent sigmoids.

    Raises:
        ConfigError: an unknown rule.
    """
    logits = np.asarray(logits, np.float32)
    if rule == "softmax":
        exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)
    if rule == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))  # no overflow at either end
    raise ConfigError(f"the score rule is {rule!r}: it must be 'softmax' or 'sigmoid'")


def fit_temperature(
    logits: Float[np.ndarray, "n m"], target: Int[np.ndarray, " n"], rule: Rule = "softmax"
) -> float:
    """Fit the temperature T that maximises the likelihood of the labels, given logits / T.

    Temperature scaling (Guo et al., 2017, arXiv:1706.04599) with a log-normal prior. The prior
    prevents overconfidence if a handful of labels are all predicted correctly.

    Args:
        logits: of labelled images.
        target: their classes.
        rule: "softmax", or "sigmoid" for independent labels.

    Raises:
        ConfigError: no images.
    """
    if not len(logits):
        raise ConfigError("there are no labelled images: calibrate on at least one")
    check_choice("rule", rule, ("softmax", "sigmoid"))
    logits, target = np.asarray(logits, np.float64), np.asarray(target)
    truth = np.eye(logits.shape[1])[target]

    def cost(log_t: float) -> float:
        z = logits / math.exp(log_t)
        if rule == "sigmoid":
            loss = (np.logaddexp(0, z) - truth * z).sum()
        else:
            top = z.max(axis=1, keepdims=True)
            loss = (np.log(np.exp(z - top).sum(axis=1)) + top[:, 0] - (z * truth).sum(axis=1)).sum()
        return float(loss) + log_t**2 / (2 * PRIOR**2)

    from scipy.optimize import minimize_scalar

    return math.exp(minimize_scalar(cost, bounds=(-5, 5), method="bounded").x)


def encode_images(
    model: Encoder,
    images: Images,
    batch_size: int | None = None,
    on_error: OnError | None = None,
    *,
    multi_vector: bool = False,
) -> tuple[Float[np.ndarray, "n *v d"], tuple[Any, ...]]:
    """Encode a stream of images; return embeddings and the first few images, for display.

    With `multi_vector`, a model that makes several vectors of an image gives all.

    Raises:
        ConfigError: no images, or several vectors of an image without `multi_vector`.
    """
    first: dict[int, Any] = {}

    def remember_first(stream: Iterator[Any]) -> Iterator[Any]:
        for number, image in enumerate(stream):
            if len(first) < SHOWN:
                first[number] = image
            yield image

    def skip(number: int, error: DataError) -> None:
        first.pop(number, None)
        assert on_error is not None
        on_error(number, error)

    stream = one_or_many(images)
    head = list(itertools.islice(stream, 1))
    if not head:
        raise ConfigError("there are no images: give at least one")
    options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    if on_error is not None:
        options["on_error"] = skip
    everything = remember_first(itertools.chain(head, stream))
    if multi_vector:
        z_image = image_vectors(model, everything, **options)
    else:
        z_image = np.asarray(model.encode_image(everything, **options), np.float32)
    return z_image, tuple(first.values())
