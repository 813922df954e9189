"""Temperature scaling: calibrate scores as probabilities from a few labelled images."""

import math

import numpy as np
from jaxtyping import Float, Int

from vlm.errors import ConfigError, check_choice

PRIOR = 0.5  # standard deviation of log temperature around 0: few labels move it little


def fit_temperature(
    logits: Float[np.ndarray, "n m"], target: Int[np.ndarray, " n"], rule: str = "softmax"
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
