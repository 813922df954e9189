"""Cases of the linear probe: sizes, penalties, unequal scales of features, sizes of classes."""

import numpy as np

# Images, width, classes, penalty, how far the classes are apart, exponents of ten of the scales of
# the features, and whether the rows have unit norm.
CASES = {
    "few": (60, 32, 5, 1.0, 0.3, 0.3, True),
    "fewer than dimensions": (40, 96, 8, 0.01, 0.3, 0.3, True),
    "separable, no penalty to speak of": (200, 48, 10, 0.01, 0.8, 0.3, True),
    "overlapping, no penalty to speak of": (300, 32, 6, 0.01, 0.1, 0.3, True),
    "many classes": (400, 48, 60, 1.0, 0.4, 0.3, True),
    "a strong penalty": (300, 48, 10, 1e4, 0.3, 0.3, True),
    "scales of 1e-3 to 1e3": (300, 24, 5, 1.0, 0.2, 3.0, False),
    "scales of 1e-2 to 1e2, weak": (300, 24, 5, 0.01, 0.2, 2.0, False),
}


def data(name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Embeddings, classes and penalty of a case."""
    n, d, m, l2, apart, decades, unit = CASES[name]
    rng = np.random.default_rng(list(CASES).index(name))
    share = np.arange(1, m + 1) / (m * (m + 1) / 2)
    target = np.concatenate([np.arange(m), rng.choice(m, n - m, p=share)])
    z = apart * rng.standard_normal((m, d))[target] + rng.standard_normal((n, d))
    z = z * 10 ** np.linspace(-decades, decades, d) + 0.5
    if unit:
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z.astype(np.float32), target, l2


def objective(z, target, weight, bias, l2) -> float:
    """scikit-learn's objective with C = 1 / l2 on z * sqrt(d), in float64."""
    logits = z.astype(np.float64) @ weight.astype(np.float64) + bias
    top = logits.max(axis=1)
    loss = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    loss -= logits[np.arange(len(z)), target]
    return float(loss.sum() + l2 / 2 * (weight.astype(np.float64) ** 2).sum() / z.shape[1])
