"""Few-shot classification: heads fitted on the embeddings of a few labelled images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from vlm import display
from vlm.errors import ConfigError, check_choice
from vlm.heads.classifier_file import reading_classifier, write_classifier
from vlm.heads.encoder import Encoder
from vlm.heads.inputs import Images
from vlm.heads.linear_probe import fit_linear, fit_swept
from vlm.heads.prompts import indices, normalise
from vlm.heads.zero_shot import Embeddings, ImageClassifier, ZeroShotClassifier, encode_images

Method = Literal["linear", "mean", "anchored", "cache", "tuned_cache"]
METHODS: tuple[Method, ...] = ("linear", "mean", "anchored", "cache", "tuned_cache")
KEY = "vlm few-shot classifier"  # of a saved one's description
FROM_ZERO_SHOT = ("anchored", "cache", "tuned_cache")

# Standard deviation of the Gaussian prior of "anchored": the expected change of a class's weights
# from its prompts' embedding, divided by the logit scale.
MOVE = 0.2

# The residual ratio and sharpness of Tip-Adapter (arXiv:2207.09519, section 4.1), as published.
RATIO, SHARPNESS = 1.0, 5.5
TUNING_STEPS, TUNING_RATE = 100, 1e-3


@dataclass(frozen=True)
class LinearHead:
    """Linear head: logits are z_image @ weight + bias, with weight (d, m) and bias (m,)."""

    weight: Float[np.ndarray, "d m"]
    bias: Float[np.ndarray, " m"]

    def __call__(self, z_image: Float[Embeddings, "n d"]) -> Float[Embeddings, "n m"]:
        return z_image @ self.weight + self.bias


@dataclass(frozen=True)
class CacheHead:
    """Tip-Adapter: zero-shot logits plus votes of cached examples, weighted by similarity.

    Attributes:
        zero_shot: (d, m); z_image @ zero_shot are the zero-shot logits.
        keys: (n, d) embeddings of the examples. values: (n, m) their classes, one-hot.
    """

    zero_shot: Float[np.ndarray, "d m"]
    keys: Float[np.ndarray, "n d"]
    values: Float[np.ndarray, "n m"]

    def __call__(self, z_image: Float[Embeddings, "n d"]) -> Float[Embeddings, "n m"]:
        product = SHARPNESS * (z_image @ self.keys.T - 1)
        nearness = product.__array_namespace__().exp(product)  # NumPy, or JAX inside `jit`
        return z_image @ self.zero_shot + (RATIO * nearness) @ self.values


class FewShotClassifier(ImageClassifier, display.FactSheet):
    """Classifier trained on a few labelled images; made by `fit`.

    Attributes:
        labels: the m class names, in the order of the zero-shot classifier, else sorted.
        head: maps embeddings to logits.

    Example:
        >>> labels = ["red", "green", "blue"]
        >>> classify = vlm.FewShotClassifier.fit(model, pictures, labels, method="mean")
        >>> [row[0][0] for row in classify(pictures).top(1)]
        ['red', 'green', 'blue']
    """

    def __init__(self, model: Encoder, labels: Sequence[str], head: LinearHead | CacheHead):
        self.model, self.labels, self.head = model, tuple(labels), head

    @classmethod
    def fit(
        cls,
        model: Encoder,
        images: Images,
        labels: Sequence[str],
        method: Method = "linear",
        l2: float | None = None,
        batch_size: int | None = None,
        zero_shot: ZeroShotClassifier | None = None,
        validation: tuple[Images, Sequence[str]] | None = None,
    ) -> "FewShotClassifier":
        """Fit a head on labelled images; the model is frozen.

        Args:
            model: a model from `vlm.load`, or another `Encoder`.
            images: PIL images, paths or arrays of pixels, any iterable.
            labels: the class of each image.
            method: "linear", the linear probe of CLIP (arXiv:2103.00020, appendix A.3). "mean", the
                nearest class mean (prototypical networks, arXiv:1703.05175). "anchored", a linear
                probe that is initialized with the zero-shot weights and regularized towards them,
                more strongly the fewer images a class has. "cache", Tip-Adapter (arXiv:2207.09519):
                zero-shot logits plus votes of the images, without training; "tuned_cache" trains
                the cached embeddings on the same images.
            l2: the penalty of "linear" and "anchored"; see `fit_linear`. By default 1 for "linear",
                and chosen by the number of images for "anchored".
            batch_size: for encoding; None uses the default of the model.
            zero_shot: the classifier to start from; "anchored" and the caches need one.
            validation: images and labels to choose the penalty of "linear" by.

        Raises:
            ConfigError: no images, another number of labels than images, fewer than two classes,
                an unknown method, an l2 that is not positive, a label that `zero_shot` lacks, or
                no `zero_shot` where the method starts from it.
        """
        if method not in METHODS:
            raise ConfigError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
        if method in FROM_ZERO_SHOT and zero_shot is None:
            raise ConfigError(f"method {method!r} starts from zero_shot: give a ZeroShotClassifier")
        labels = list(labels)
        if not all(isinstance(label, str) for label in labels):
            raise ConfigError("labels must be texts, the class name of each image")
        names = sorted(set(labels)) if zero_shot is None else list(zero_shot.labels)
        target = indices(labels, names)
        if len(names) < 2:
            raise ConfigError(f"labels hold {len(names)} class(es): give examples of at least two")
        z_image, _ = encode_images(model, images, batch_size)
        if len(z_image) != len(labels):
            raise ConfigError(
                f"{len(z_image)} images and {len(labels)} labels: give one label each"
            )
        if validation is not None and method == "linear" and l2 is None:
            z, _ = encode_images(model, validation[0], batch_size)
            against = indices(list(validation[1]), names)
            (weight, bias), _ = fit_swept(z_image, target, z, against)
            return cls(model, names, LinearHead(weight, bias))
        scale = model.logit_scale
        prior = None if zero_shot is None else scale * zero_shot.z_labels.T
        return cls(model, names, fit_head(z_image, target, method, l2, prior, scale, len(names)))

    def logits(self, z_image: Float[Embeddings, "n d"]) -> Float[Embeddings, "n m"]:
        """Compute the logits of embeddings over the labels; works inside `jit`."""
        return self.head(z_image).astype(np.float32)

    def save(self, file: str | os.PathLike) -> None:
        """Write the classifier to a `.safetensors` file."""
        about = {"labels": self.labels, "head": type(self.head).__name__}
        write_classifier(file, KEY, self.model, about, vars(self.head))

    @classmethod
    def load(cls, file: str | os.PathLike, model: Encoder) -> "FewShotClassifier":
        """Load a classifier that `save` wrote.

        Raises:
            CheckpointError: no such file, another file, or one of another model.
        """
        kinds = {kind.__name__: kind for kind in (LinearHead, CacheHead)}
        with reading_classifier(file, KEY, model) as (about, tensors):
            classifier = cls(model, about["labels"], kinds[about["head"]](**tensors))
            weights = tensors["weight" if isinstance(classifier.head, LinearHead) else "zero_shot"]
            if weights.shape[1] != len(classifier.labels):
                raise ValueError("the numbers of weights and labels differ")
        return classifier

    def _facts(self) -> tuple[str, dict[str, str]]:
        return "Few-shot classifier", {
            "model": str(self.model.name),
            "labels": display.listed(self.labels),
            "head": type(self.head).__name__,
        }


def fit_head(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    method: Method,
    l2: float | None = None,
    prior: Float[np.ndarray, "d m"] | None = None,
    scale: float = 1.0,
    classes: int | None = None,
) -> LinearHead | CacheHead:
    """Fit the head of `FewShotClassifier.fit` on embeddings.

    Args:
        z_image: embeddings of the examples, unit norm.
        target: their classes.
        method, l2: see `FewShotClassifier.fit`.
        prior: zero-shot weights: the logit scale times the embeddings of the classes.
        scale: the logit scale.
        classes: the number of classes, if some have no example.
    """
    check_choice("method", method, METHODS)
    m = classes or int(target.max()) + 1
    if method == "linear":
        return LinearHead(*fit_linear(z_image, target, 1.0 if l2 is None else l2, classes=m))
    if method == "mean":
        return LinearHead(scale * class_means(z_image, target).T, np.zeros(m, np.float32))
    if prior is None:
        raise ConfigError(f"method {method!r} starts from zero-shot weights: give them as `prior`")
    if method == "anchored":
        strength = anchored_l2(len(z_image) / m, scale, z_image.shape[1]) if l2 is None else l2
        return LinearHead(*fit_linear(z_image, target, strength, prior, classes=m))
    values = np.eye(m, dtype=np.float32)[target]
    keys = z_image if method == "cache" else _tuned_keys(prior, z_image, values)
    return CacheHead(prior, keys, values)


def anchored_l2(shots: float, scale: float, embed_dim: int) -> float:
    """Compute the penalty of "anchored" from the number of images per class.

    With many images it is that of a Gaussian prior around the zero-shot weights whose standard
    deviation is `MOVE` times the logit scale, in the units of `fit_linear`. The likelihood ignores
    that few images estimate a class poorly. So the penalty is multiplied by 1 + 1 / shots, as the
    variance of a mean is.
    """
    spread = MOVE * scale
    return (1 + 1 / max(shots, 1e-3)) * embed_dim / spread**2


def class_means(
    z_image: Float[np.ndarray, "n d"], target: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "m d"]:
    """Compute the unit-norm mean embedding of each class 0 .. max(target)."""
    total = np.zeros((int(target.max()) + 1, z_image.shape[1]), np.float32)
    np.add.at(total, target, z_image)
    return normalise(total, "the mean embedding of a class")


def _tuned_keys(prior, z_image, values) -> np.ndarray:
    """Train the cached embeddings to classify each example by the votes of the other examples.

    An example's own key is left out (leave-one-out), because it would always vote for its label.
    """
    import jax
    import jax.numpy as jnp
    import optax

    zero, values = jnp.asarray(z_image @ prior), jnp.asarray(values)
    not_self = 1 - jnp.eye(len(z_image))
    x = jnp.asarray(z_image)

    def loss(keys):
        nearness = jnp.exp(SHARPNESS * (x @ keys.T - 1)) * not_self
        logits = zero + RATIO * nearness @ values
        return optax.softmax_cross_entropy(logits, values).mean()

    solver = optax.adamw(optax.cosine_decay_schedule(TUNING_RATE, TUNING_STEPS), eps=1e-4)

    def step(carry, _):
        keys, state = carry
        updates, state = solver.update(jax.grad(loss)(keys), state, keys)
        return (optax.apply_updates(keys, updates), state), None

    tuned = jax.jit(lambda keys: jax.lax.scan(step, (keys, solver.init(keys)), None, TUNING_STEPS))
    return np.asarray(tuned(x)[0][0])
