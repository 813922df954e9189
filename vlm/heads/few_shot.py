"""Few-shot classification: a head fitted on the embeddings of a handful of labelled images."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from vlm.errors import ConfigError
from vlm.heads.prompts import normalise
from vlm.heads.zero_shot import Classification, encode_images

Method = Literal["linear", "mean"]


class FewShotClassifier:
    """Classifies images into the classes of a few labelled examples; made by `fit`.

    Attributes:
        labels: the m class names, sorted.
        weight: (d, m) and bias: (m,), so that logits are z_image @ weight + bias.
    """

    def __init__(
        self,
        model: Any,
        labels: Sequence[str],
        weight: Float[np.ndarray, "d m"],
        bias: Float[np.ndarray, " m"],
    ):
        self.model, self.labels, self.weight, self.bias = model, tuple(labels), weight, bias

    @classmethod
    def fit(
        cls,
        model: Any,
        images: Any,
        labels: Sequence[str],
        method: Method = "linear",
        l2: float = 1.0,
        batch_size: int | None = None,
    ) -> "FewShotClassifier":
        """Fit a head on labelled images; the model itself stays as it is.

        Args:
            model: what `vlm.load` gives.
            images: PIL images, paths or arrays of pixels, any iterable.
            labels: the class of each image.
            method: "linear", the linear probe of CLIP (arXiv:2103.00020, appendix A.3); or "mean",
                the nearest class mean (prototypical networks, arXiv:1703.05175), for one to four
                examples per class.
            l2: the linear probe's penalty; see `fit_linear`.
            batch_size: of encoding; None leaves it to the model.

        Raises:
            ConfigError: no images, another number of labels than images, fewer than two classes,
                an unknown method, an l2 that is not positive.
        """
        labels = list(labels)
        if not all(isinstance(label, str) for label in labels):
            raise ConfigError("labels must be texts, the class name of each image")
        names, target = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
        if len(names) < 2:
            raise ConfigError(f"labels hold {len(names)} class(es): give examples of at least two")
        if method not in ("linear", "mean"):
            raise ConfigError(f"method is {method!r}: it must be 'linear' or 'mean'")
        z_image, _ = encode_images(model, images, batch_size)
        if len(z_image) != len(labels):
            raise ConfigError(
                f"{len(z_image)} images and {len(labels)} labels: give one label each"
            )
        if method == "linear":
            weight, bias = fit_linear(z_image, target, l2)
        else:
            weight = model.logit_scale * class_means(z_image, target).T
            bias = np.zeros(len(names), np.float32)
        return cls(model, names.tolist(), weight, bias)

    def __call__(self, images: Any, batch_size: int | None = None) -> Classification:
        """Classify one image or any iterable of them; scores of an image sum to one."""
        z_image, first = encode_images(self.model, images, batch_size)
        # The classes exclude each other by the way they were fitted, whatever the model's own rule.
        return Classification(self.labels, z_image @ self.weight + self.bias, "softmax", first)

    classify = __call__

    def __repr__(self) -> str:
        names = ", ".join(self.labels[:4]) + (", ..." if len(self.labels) > 4 else "")
        return f"FewShotClassifier({self.model.name}, {len(self.labels)} labels: {names})"


def class_means(
    z_image: Float[np.ndarray, "n d"], target: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "m d"]:
    """The unit-norm mean embedding of each class 0 .. max(target)."""
    total = np.zeros((int(target.max()) + 1, z_image.shape[1]), np.float32)
    np.add.at(total, target, z_image)
    return normalise(total, "the mean embedding of a class")


def fit_linear(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    l2: float = 1.0,
    max_steps: int = 1000,
    tolerance: float = 1e-5,
) -> tuple[Float[np.ndarray, "d m"], Float[np.ndarray, " m"]]:
    """Multinomial logistic regression on embeddings, solved by L-BFGS to its optimum.

    Minimises the sum of cross-entropies plus l2 / 2 times the squared norm of the weights, on
    embeddings scaled by sqrt(d), so that a coordinate has about unit variance and `l2` means the
    same at any width (it is scikit-learn's 1 / C). The bias carries no penalty.

    Args:
        z_image: embeddings, unit norm.
        target: classes 0 .. m - 1.
        l2: weight of the penalty; larger for fewer or noisier examples.
        max_steps: an upper bound on the L-BFGS steps.
        tolerance: the gradient norm, per example, at which the optimum is reached.

    Returns:
        The weights and bias for unscaled embeddings.

    Raises:
        ConfigError: an l2 that is not positive (the optimum would be at infinity).
    """
    if not l2 > 0:
        raise ConfigError(f"l2 is {l2}: it must be positive, or separable classes have no optimum")
    n, d = z_image.shape
    scale = np.float32(np.sqrt(d))
    params = (
        jnp.zeros((d, int(target.max()) + 1), jnp.float32),
        jnp.zeros(int(target.max()) + 1, jnp.float32),
    )
    x, y = jnp.asarray(z_image, jnp.float32) * scale, jnp.asarray(target)
    weight, bias = _minimise(params, x, y, jnp.float32(l2 / n), max_steps, tolerance)
    return np.asarray(weight) * scale, np.asarray(bias)


def _objective(params, x, y, l2):
    weight, bias = params
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ weight + bias, y)
    return losses.mean() + l2 / 2 * jnp.sum(weight**2)


@jax.jit
def _minimise(params, x, y, l2, max_steps, tolerance):
    """L-BFGS with a zoom line search (Nocedal and Wright, 2006, chapters 3 and 7)."""
    solver = optax.lbfgs()

    def objective(params):
        return _objective(params, x, y, l2)

    value_and_grad: Callable = optax.value_and_grad_from_state(objective)

    def step(carry):
        params, state, _, i = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad), i + 1

    def unfinished(carry):
        return (carry[2] > tolerance) & (carry[3] < max_steps)

    start = (params, solver.init(params), jnp.float32(jnp.inf), jnp.int32(0))
    return jax.lax.while_loop(unfinished, step, start)[0]
