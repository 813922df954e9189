"""The fitted temperature has the lowest loss on a fine grid."""

import numpy as np
import pytest
from scipy.special import log_expit, log_softmax

from vlm.heads.zero_shot import PRIOR, fit_temperature


@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
def test_the_temperature_is_the_best_of_a_grid(rule):
    rng = np.random.default_rng(0)
    grid = np.linspace(-5, 5, 2001)
    for _ in range(30):
        n, m = rng.integers(1, 60), rng.integers(2, 8)
        logits = 10 ** rng.uniform(-1, 1.5) * rng.standard_normal((n, m))
        target = np.where(rng.random(n) < 0.7, logits.argmax(1), rng.integers(0, m, n))
        scaled = logits / np.exp(grid)[:, None, None]
        truth = np.eye(m)[target] > 0
        if rule == "softmax":
            cost = -log_softmax(scaled, axis=2)[:, truth].sum(1)
        else:
            cost = -log_expit(np.where(truth, scaled, -scaled)).sum((1, 2))
        best = grid[(cost + grid**2 / (2 * PRIOR**2)).argmin()]
        assert np.log(fit_temperature(logits, target, rule)) == pytest.approx(best, abs=0.004)
