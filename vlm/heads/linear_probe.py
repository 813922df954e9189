"""Linear probes: multinomial logistic regression on embeddings, to its optimum, fast.

The features are centred and preconditioned by their own covariance first: in that space the
curvature is nearly the same in every direction (Böhning, 1992, doi:10.1007/BF00048682, bounds it by
the covariance), and L-BFGS needs a few steps where the plain problem takes many.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vlm.errors import ConfigError

CURVATURE = 0.2  # what the preconditioner expects of the softmax; at most 1 / 2
SWEEP = tuple(10.0**e for e in range(-2, 5))  # penalties to choose from on a validation split

Weights = tuple[Float[np.ndarray, "d m"], Float[np.ndarray, " m"]]


def fit_linear(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    l2: float = 1.0,
    prior: Float[np.ndarray, "d m"] | None = None,
    max_steps: int = 1000,
    tolerance: float = 3e-5,
    classes: int | None = None,
) -> Weights:
    """Multinomial logistic regression on embeddings, solved by L-BFGS to its optimum.

    Minimises the sum of cross-entropies plus l2 / 2 times the squared norm of the weights, on
    embeddings scaled by sqrt(d), so that a coordinate has about unit variance and `l2` means the
    same at any width (it is scikit-learn's 1 / C). The bias carries no penalty.

    Args:
        z_image: embeddings, unit norm.
        target: classes 0 .. m - 1.
        l2: weight of the penalty; larger for fewer or noisier examples.
        prior: weights for unscaled embeddings, from which the penalty measures and the fit starts;
            there is no bias then. Zeros by default.
        max_steps: an upper bound on the L-BFGS steps.
        tolerance: the largest entry of the gradient, per example and in the preconditioned space,
            at which the optimum is reached.
        classes: m, if some have no example.

    Returns:
        The weights and bias for unscaled embeddings.

    Raises:
        ConfigError: an l2 that is not positive (the optimum would be at infinity).
    """
    if not l2 > 0:
        raise ConfigError(f"l2 is {l2}: it must be positive, or separable classes have no optimum")
    n, d = z_image.shape
    scale = float(np.sqrt(d))
    m = classes or int(target.max()) + 1
    x = np.asarray(z_image, np.float32) * np.float32(scale)
    # Without a bias there is nothing that could take up the mean.
    mean = x.mean(axis=0) if prior is None else np.zeros(d, np.float32)
    x -= mean
    penalty = l2 / n
    covariance = np.asarray(x.T @ x, np.float64) / n
    lower = np.linalg.cholesky(CURVATURE * covariance + penalty * np.eye(d))
    inverse = np.linalg.inv(lower)  # w = inverse.T @ v
    start = np.zeros((d, m)) if prior is None else np.asarray(prior, np.float64) / scale
    x = x @ inverse.T.astype(np.float32)
    problem = (x, target, inverse, start, penalty)
    v, bias = _minimise(lower.T @ start, prior is None, *problem, max_steps, tolerance)
    weight = inverse.T @ v
    return (
        (weight * scale).astype(np.float32),
        (bias - mean @ weight if prior is None else bias).astype(np.float32),
    )


def _minimise(v, with_bias, x, target, inverse, start, penalty, max_steps, tolerance):
    """L-BFGS of SciPy (Byrd, Lu, Nocedal and Zhu, 1995, doi:10.1137/0916069)."""
    from scipy.optimize import minimize

    shape, size, rows = v.shape, v.size, np.arange(len(x))

    def evaluate(flat):
        v, bias = flat[:size].reshape(shape), flat[size:]
        logits = x @ v.astype(np.float32) + bias.astype(np.float32)
        logits -= logits.max(axis=1, keepdims=True)
        right = logits[rows, target]
        exp = np.exp(logits, out=logits)
        total = exp.sum(axis=1)
        # Summed in float64, or a line search near the optimum would see rounding and no descent.
        value = np.mean(np.log(total) - right, dtype=np.float64)
        exp /= total[:, None]
        exp[rows, target] -= 1
        exp /= np.float32(len(x))
        moved = inverse.T @ v - start
        by_v = x.T @ exp + penalty * (inverse @ moved)
        by_bias = exp.sum(axis=0) if with_bias else np.zeros(shape[1])
        return value + penalty / 2 * np.sum(moved**2), np.concatenate([by_v.ravel(), by_bias])

    first = np.concatenate([v.ravel(), np.zeros(shape[1])])
    options = {"maxiter": max_steps, "gtol": tolerance, "ftol": 1e-9, "maxcor": 20}
    found = minimize(evaluate, first, jac=True, method="L-BFGS-B", options=options).x
    return found[:size].reshape(shape), found[size:]


def fit_swept(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    z_validation: Float[np.ndarray, "v d"],
    target_validation: Int[np.ndarray, " v"],
    penalties: Sequence[float] = SWEEP,
) -> tuple[Weights, float]:
    """The plain probe with the penalty that does best on a validation split, and that penalty.

    The largest of equally good ones.

    Raises:
        ConfigError: no validation examples.
    """
    if not len(z_validation):
        raise ConfigError("there are no validation images: give some, or an l2 of your own")
    best: tuple[float, Weights, float] | None = None
    for l2 in sorted(penalties, reverse=True):
        weight, bias = fit_linear(z_image, target, l2, classes=int(target.max()) + 1)
        right = float(((z_validation @ weight + bias).argmax(1) == target_validation).mean())
        if best is None or right > best[0]:
            best = right, (weight, bias), l2
    assert best is not None
    return best[1], best[2]
