"""Linear probes: multinomial logistic regression on embeddings, solved to the optimum.

The features are centred and preconditioned by their covariance. The curvature is then nearly the
same in every direction (Böhning, 1992, doi:10.1007/BF00048682, bounds it by the covariance), and
conjugate gradients converge in few iterations. The fit stops by the duality gap, which bounds the
distance to the optimum for any penalty.
"""

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vlm.errors import ConfigError

# The curvature of a class's logit is p (1 - p): about 1 / m for uniform probabilities, and less the
# better the fit. The preconditioner assumes a quarter of that on average.
CURVATURE = 0.25
TINY = np.finfo(np.float64).tiny
SWEEP = tuple(10.0**e for e in range(-2, 5))  # penalties tried on a validation split

Weights = tuple[Float[np.ndarray, "d m"], Float[np.ndarray, " m"]]


def fit_linear(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    l2: float = 1.0,
    prior: Float[np.ndarray, "d m"] | None = None,
    max_steps: int = 50,
    tolerance: float = 1e-3,
    classes: int | None = None,
) -> Weights:
    """Fit multinomial logistic regression on embeddings by Newton's method, to the optimum.

    Minimises the sum of cross-entropies plus l2 / 2 times the squared norm of the weights. The
    embeddings are scaled by sqrt(d), so that a coordinate has about unit variance and `l2` has the
    same effect at any width (it is scikit-learn's 1 / C). The bias is not penalized.

    Args:
        z_image: embeddings, unit norm.
        target: classes 0 .. m - 1.
        l2: weight of the penalty; larger for fewer or noisier examples.
        prior: weights for unscaled embeddings; the penalty is on the difference from them, and the
            fit starts there. There is no bias then. Zeros by default.
        max_steps: maximum number of Newton steps, in float32 and again in float64.
        tolerance: relative duality gap at which the fit stops. A fit that does not converge in
            `max_steps` logs a warning with its gap.
        classes: m, if some classes have no example.

    Returns:
        Weights and bias for unscaled embeddings.

    Raises:
        ConfigError: an l2 that is not positive (the optimum would be at infinity).
    """
    if not l2 > 0:
        raise ConfigError(f"l2 is {l2}: it must be positive, or separable classes have no optimum")
    n, d = z_image.shape
    m = classes or int(target.max()) + 1
    start = np.zeros((d, m)) if prior is None else np.asarray(prior, np.float64)
    penalty = l2 / (n * d)  # of weights for unscaled embeddings, per example
    # If float32 is too imprecise to converge, float64 continues.
    gap, weight, bias = np.inf, start, np.zeros(m)
    for dtype in (np.float32, np.float64):
        probe = _Probe(np.asarray(z_image, dtype), target, start, prior is None, penalty)
        flat, gap = _minimise(probe, probe.packed(weight, bias), max_steps, tolerance)
        weight, bias = probe.unpacked(flat)
        if gap <= tolerance:
            break
    else:
        logging.getLogger(__name__).warning(
            "the linear probe with l2 %g stopped after %d steps at most %.2g%% above its optimum, "
            "not %.2g%%: raise l2, tolerance or max_steps",
            l2, max_steps, 100 * gap, 100 * tolerance,
        )  # fmt: skip
    return weight.astype(np.float32), bias.astype(np.float32)


class _Probe:
    """Objective in preconditioned variables v and c: weight = to_weight @ v, bias = unit * c.

    The bias is that of centred rows.
    """

    def __init__(self, x, target, start, with_bias, penalty):
        from scipy.linalg import solve_triangular

        self.x, self.target, self.start = x, target, start
        self.with_bias, self.penalty = with_bias, penalty
        (n, d), (_, m) = x.shape, start.shape
        # Without a bias the rows cannot be centred.
        self.mean = x.mean(axis=0, dtype=np.float64) * with_bias
        self.frequency = np.bincount(target, minlength=m) / n  # of each class
        curvature = CURVATURE / m
        covariance = (x.T @ x) / np.float64(n) - np.outer(self.mean, self.mean)
        covariance *= curvature
        rounding = np.finfo(x.dtype).eps * np.trace(covariance)
        self.lower = np.linalg.cholesky(covariance + (penalty + rounding) * np.eye(d))
        self.to_weight = solve_triangular(self.lower, np.eye(d), lower=True).T
        self.unit = curvature**-0.5
        self.last = np.empty(0), np.empty((0, m))  # last point and its probabilities

    def packed(self, weight, bias) -> np.ndarray:
        centred = (bias + self.mean @ weight) / self.unit
        return np.concatenate([(self.lower.T @ weight).ravel(), centred])

    def unpacked(self, flat) -> Weights:
        weight = self.to_weight @ flat[: self.start.size].reshape(self.start.shape)
        return weight, self.unit * flat[self.start.size :] - self.mean @ weight

    def evaluate(self, flat) -> tuple[float, np.ndarray, np.ndarray]:
        """Compute the objective, its gradient, and the class probabilities."""
        rows = np.arange(len(self.x))
        weight, bias = self.unpacked(flat)
        logits = self._logits(weight, bias)
        logits -= logits.max(axis=1, keepdims=True)
        right = logits[rows, self.target]
        p = np.exp(logits, out=logits)
        total = p.sum(axis=1, keepdims=True)
        # Summed in float64: near the optimum, float32 rounding would hide the descent.
        value = np.mean(np.log(total[:, 0]) - right, dtype=np.float64)
        p /= total
        moved = weight - self.start
        p[rows, self.target] -= 1
        gradient = self._gradient(p, moved)
        p[rows, self.target] += 1
        return value + self.penalty / 2 * np.sum(moved**2), gradient, p

    def value_and_gradient(self, flat) -> tuple[float, np.ndarray]:
        value, gradient, p = self.evaluate(flat)
        self.last = flat.copy(), p
        return value, gradient

    def curvature(self, flat, step) -> np.ndarray:
        """Compute the product of the Hessian with a step."""
        if not np.array_equal(flat, self.last[0]):
            self.value_and_gradient(flat)
        p, (weight, bias) = self.last[1], self.unpacked(step)
        moved = self._logits(weight, bias)
        moved -= np.einsum("nm,nm->n", p, moved)[:, None]
        moved *= p
        return self._gradient(moved, weight)

    def _logits(self, weight, bias) -> np.ndarray:
        logits = self.x @ weight.astype(self.x.dtype)
        logits += bias.astype(self.x.dtype)
        return logits

    def _gradient(self, error, moved) -> np.ndarray:
        """Gradient by v and c of the mean loss and the penalty, from the gradient by the logits."""
        by_bias = error.sum(axis=0, dtype=np.float64) / len(error)
        by_weight = (self.x.T @ error) / np.float64(len(error)) + self.penalty * moved
        by_weight -= np.outer(self.mean, by_bias)
        by_bias *= self.unit * self.with_bias
        return np.concatenate([(self.to_weight.T @ by_weight).ravel(), by_bias])

    def gap(self, flat) -> float:
        """Compute the relative duality gap, an upper bound of the distance to the minimum.

        A dual point is any set of probabilities q whose mean per class equals the class frequency.
        It bounds the minimum from below by mean entropy + <G, start> - |G|^2 / (2 penalty), where G
        is the gradient of the losses with q as the model's probabilities. The model's probabilities
        are projected to such a q (without a bias, this is not needed).
        """
        value, _, q = self.evaluate(flat)
        if self.with_bias:
            q *= self.frequency / np.maximum(q.mean(axis=0, dtype=np.float64), TINY)
            q /= q.sum(axis=1, keepdims=True)
            mean, present = q.mean(axis=0, dtype=np.float64), self.frequency > 0
            mixed = max(0.0, float(((mean - self.frequency)[present] / mean[present]).max()))
            q = (1 - mixed) * q + np.maximum(self.frequency - (1 - mixed) * mean, 0)
        entropy = -np.sum(q * np.log(np.maximum(q, TINY)), dtype=np.float64) / len(q)
        q[np.arange(len(q)), self.target] -= 1
        by_weight = (self.x.T @ q) / np.float64(len(q))
        dual = entropy + np.sum(by_weight * self.start)
        dual -= np.sum(by_weight**2) / (2 * self.penalty)
        return float((value - dual) / max(value, TINY))


def _minimise(probe: _Probe, first: np.ndarray, max_steps: int, tolerance: float):
    """Minimise by trust-region Newton with conjugate gradients (SciPy's trust-ncg).

    Source: Nocedal and Wright, 2006, Numerical Optimization, algorithm 7.2.

    Returns:
        The final point and its duality gap.
    """
    from scipy.optimize import minimize

    found, gap = first, probe.gap(first)

    def stop_at_the_optimum(intermediate_result) -> None:
        nonlocal found, gap
        if intermediate_result.x is not found:  # else the step was rejected
            found, gap = intermediate_result.x, probe.gap(intermediate_result.x)
        if gap <= tolerance:
            raise StopIteration

    minimize(
        probe.value_and_gradient, first, jac=True, hessp=probe.curvature, method="trust-ncg",
        options={"maxiter": max_steps, "gtol": 0}, callback=stop_at_the_optimum,
    )  # fmt: skip
    return found, gap


def fit_swept(
    z_image: Float[np.ndarray, "n d"],
    target: Int[np.ndarray, " n"],
    z_validation: Float[np.ndarray, "v d"],
    target_validation: Int[np.ndarray, " v"],
    penalties: Sequence[float] = SWEEP,
) -> tuple[Weights, float]:
    """Fit a linear probe with the penalty that is best on a validation split; ties: the largest.

    Returns the weights and the penalty.

    Raises:
        ConfigError: no validation examples.
    """
    if not len(z_validation):
        raise ConfigError("there are no validation images: give some, or choose l2")
    best: tuple[float, Weights, float] | None = None
    for l2 in sorted(penalties, reverse=True):
        weight, bias = fit_linear(z_image, target, l2)
        right = float(((z_validation @ weight + bias).argmax(1) == target_validation).mean())
        if best is None or right > best[0]:
            best = right, (weight, bias), l2
    assert best is not None
    return best[1], best[2]
