"""Few-shot heads: the optimum is the optimum, and it classifies."""

import numpy as np
import pytest

from vlm.errors import ConfigError
from vlm.heads.few_shot import FewShotClassifier, class_means, fit_linear

COLOURS = ["red", "green", "blue", "yellow"]


def clusters(seed=0, n=60, d=24, m=3, spread=0.8):
    rng = np.random.default_rng(seed)
    target = np.arange(n) % m
    z = rng.standard_normal((m, d))[target] + spread * rng.standard_normal((n, d))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z.astype(np.float32), target


def gradients(z, target, weight, bias, l2):
    """The gradient of the objective in float64 by the textbook formula, per example."""
    scale = np.sqrt(z.shape[1])
    x, w = z.astype(np.float64) * scale, weight.astype(np.float64) / scale
    logits = x @ w + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(p.shape[1])[target]) / len(z)
    return x.T @ error + l2 / len(z) * w, error.sum(0)


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_the_linear_probe_reaches_the_optimum(l2):
    z, target = clusters()
    weight, bias = fit_linear(z, target, l2)
    for gradient in gradients(z, target, weight, bias, l2):
        assert np.abs(gradient).max() < 3e-5


def test_the_optimum_does_not_depend_on_the_order_or_on_doubling():
    z, target = clusters()
    weight, bias = fit_linear(z, target, 1.0)
    order = np.random.default_rng(0).permutation(len(z))
    shuffled = fit_linear(z[order], target[order], 1.0)
    doubled = fit_linear(np.tile(z, (2, 1)), np.tile(target, 2), 2.0)
    for other in (shuffled, doubled):
        np.testing.assert_allclose(z @ other[0] + other[1], z @ weight + bias, atol=2e-3)


def test_stronger_penalty_smaller_weights():
    z, target = clusters()
    norms = [np.linalg.norm(fit_linear(z, target, l2)[0]) for l2 in (0.1, 1.0, 10.0, 100.0)]
    assert norms == sorted(norms, reverse=True)


def test_class_means_worked():
    z = np.array([[1, 0], [0, 1], [0, -1]], np.float32)
    means = class_means(z, np.array([0, 0, 1]))
    np.testing.assert_allclose(means, [[0.5**0.5, 0.5**0.5], [0, -1]], atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "mean"])
def test_both_heads_learn_from_four_images_each(model, paint, method):
    labels = COLOURS * 4
    images = [paint(c, noise=60, seed=i) for i, c in enumerate(labels)]
    classify = FewShotClassifier.fit(model, images, labels, method=method)
    fresh = [paint(c, noise=60, seed=100 + i) for i, c in enumerate(labels)]
    result = classify(fresh)
    assert [row[0][0] for row in result.top(1)] == labels
    np.testing.assert_allclose(result.scores.sum(1), 1, atol=1e-5)
    assert classify.labels == tuple(sorted(COLOURS))
    assert "colours, 4 labels" in repr(classify)


@pytest.mark.untyped
def test_bad_input(model, paint):
    images = [paint("red"), paint("blue")]
    with pytest.raises(ConfigError, match="2 images and 3 labels"):
        FewShotClassifier.fit(model, images, ["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"1 class\(es\)"):
        FewShotClassifier.fit(model, images, ["a", "a"])
    with pytest.raises(ConfigError, match=r"0 class\(es\)"):
        FewShotClassifier.fit(model, [], [])
    with pytest.raises(ConfigError, match="must be texts"):
        FewShotClassifier.fit(model, images, [0, 1])
    with pytest.raises(ConfigError, match="method is 'svm'"):
        FewShotClassifier.fit(model, images, ["a", "b"], method="svm")
    with pytest.raises(ConfigError, match="l2 is 0"):
        FewShotClassifier.fit(model, images, ["a", "b"], l2=0)
