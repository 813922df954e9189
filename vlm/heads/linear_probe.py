"""Linear probes: multinomial logistic regression on embeddings, to its optimum, fast.

The features are centred and preconditioned by their own covariance: in that space the curvature is
nearly the same in every direction (Böhning, 1992, doi:10.1007/BF00048682, bounds it by the
covariance), and L-BFGS needs a few steps where the plain problem takes many.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vlm.errors import ConfigError

# The curvature of a class's logit is p (1 - p): at most 1 / m where nothing is known yet, and less
# the better the fit. A quarter of that is what the preconditioner expects on average.
CURVATURE = 0.25
SWEEP = tuple(10.0**e for e in range(-2, 5))  # penalties to choose from on a validation split

Weights = tuple[Float[np.ndarray, "d m"], Float[np.ndarray, " m"]]


def fit_linear(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    l2: float = 1.0,
    prior: Float[np.ndarray, "d m"] | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-3,
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
        tolerance: how far above its minimum the objective may still be, as a share of it: half the
            squared norm of the preconditioned gradient, which is what a Newton step would gain.
        classes: m, if some have no example.

    Returns:
        The weights and bias for unscaled embeddings.

    Raises:
        ConfigError: an l2 that is not positive (the optimum would be at infinity).
    """
    if not l2 > 0:
        raise ConfigError(f"l2 is {l2}: it must be positive, or separable classes have no optimum")
    n, d = z_image.shape
    m = classes or int(target.max()) + 1
    x = np.asarray(z_image, np.float32)
    # Without a bias there is nothing that could take up the mean.
    mean = x.mean(axis=0, dtype=np.float64) if prior is None else np.zeros(d)
    start = np.zeros((d, m)) if prior is None else np.asarray(prior, np.float64)
    penalty = l2 / (n * d)  # of weights for unscaled embeddings, per example
    return _minimise(x, target, mean, start, prior is None, penalty, max_steps, tolerance)


def _minimise(x, target, mean, start, with_bias, penalty, max_steps, tolerance) -> Weights:
    """L-BFGS of SciPy (Byrd, Lu, Nocedal and Zhu, 1995, doi:10.1137/0916069).

    It steers v and c, where the weight is to_weight @ v and the bias, of centred rows, is unit * c.
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import minimize

    (n, d), (_, m) = x.shape, start.shape
    rows, curvature = np.arange(n), CURVATURE / m
    covariance = (x.T @ x) / np.float64(n) - np.outer(mean, mean)
    lower = np.linalg.cholesky(curvature * covariance + penalty * np.eye(d))
    to_weight = solve_triangular(lower, np.eye(d), lower=True).T
    unit = curvature**-0.5
    left = np.inf  # what a Newton step would gain, as a share of the objective

    def unpacked(flat):
        weight = to_weight @ flat[: start.size].reshape(d, m)
        return weight, unit * flat[start.size :] - mean @ weight

    def evaluate(flat):
        nonlocal left
        weight, bias = unpacked(flat)
        logits = x @ weight.astype(np.float32)
        logits += bias.astype(np.float32)
        logits -= logits.max(axis=1, keepdims=True)
        right = logits[rows, target]
        error = np.exp(logits, out=logits)
        total = error.sum(axis=1, keepdims=True)
        # Summed in float64, or a line search near the optimum would see rounding and no descent.
        value = np.mean(np.log(total[:, 0]) - right, dtype=np.float64)
        error /= total
        error[rows, target] -= 1
        by_bias = error.sum(axis=0, dtype=np.float64) / n
        moved = weight - start
        value += penalty / 2 * np.sum(moved**2)
        by_weight = (x.T @ error) / np.float64(n) - np.outer(mean, by_bias) + penalty * moved
        by_bias *= unit * with_bias
        gradient = np.concatenate([(to_weight.T @ by_weight).ravel(), by_bias])
        left = gradient @ gradient / 2 / max(value, np.finfo(np.float64).tiny)
        return value, gradient

    def stop_at_the_optimum(intermediate_result) -> None:
        if left <= tolerance:
            raise StopIteration

    first = np.concatenate([(lower.T @ start).ravel(), np.zeros(m)])
    options = {"maxiter": max_steps, "gtol": 0, "ftol": 1e-14, "maxcor": 10}
    found = minimize(
        evaluate, first, jac=True, method="L-BFGS-B", options=options, callback=stop_at_the_optimum
    ).x
    weight, bias = unpacked(found)
    return weight.astype(np.float32), bias.astype(np.float32)


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
        weight, bias = fit_linear(z_image, target, l2)
        right = float(((z_validation @ weight + bias).argmax(1) == target_validation).mean())
        if best is None or right > best[0]:
            best = right, (weight, bias), l2
    assert best is not None
    return best[1], best[2]
