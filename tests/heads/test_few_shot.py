"""Few-shot heads: fits reach the optimum, and classify."""

import numpy as np
import pytest

from vlm.errors import CheckpointError, ConfigError
from vlm.heads.few_shot import (
    METHODS,
    MOVE,
    FewShotClassifier,
    anchored_l2,
    class_means,
    fit_head,
)
from vlm.heads.linear_probe import fit_linear, fit_swept
from vlm.heads.saved import load_classifier
from vlm.heads.zero_shot import ZeroShotClassifier

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
    weight, bias = fit_linear(z, target, l2, tolerance=1e-9)
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


def test_the_penalty_of_few_shots_worked():
    many = anchored_l2(1e9, scale=10.0, embed_dim=64)
    assert many == pytest.approx(64 / (MOVE * 10.0) ** 2)
    assert anchored_l2(1, scale=10.0, embed_dim=64) == pytest.approx(2 * many)
    assert anchored_l2(4, scale=10.0, embed_dim=64) == pytest.approx(1.25 * many)


def test_stronger_penalty_smaller_weights():
    z, target = clusters()
    norms = [np.linalg.norm(fit_linear(z, target, l2)[0]) for l2 in (0.1, 1.0, 10.0, 100.0)]
    assert norms == sorted(norms, reverse=True)


def test_class_means_worked():
    z = np.array([[1, 0], [0, 1], [0, -1]], np.float32)
    means = class_means(z, np.array([0, 0, 1]))
    np.testing.assert_allclose(means, [[0.5**0.5, 0.5**0.5], [0, -1]], atol=1e-6)


def test_the_cache_worked(model):
    """Tip-Adapter's equation: exp(-5.5 (1 - cosine)) of each example, and zero-shot logits."""
    keys, prior = np.eye(3, 4, dtype=np.float32), np.ones((4, 2), np.float32)
    head = fit_head(keys, np.array([0, 1, 1]), "cache", prior=prior)
    z = np.array([[0.6, 0.8, 0, 0]], np.float32)
    a, b, c = np.exp(-5.5 * np.array([0.4, 0.2, 1]))
    np.testing.assert_allclose(head(z), [[1.4 + a, 1.4 + b + c]], rtol=1e-5)


def test_tuned_keys_improve_leave_one_out_classification():
    z, target = clusters(n=30, spread=1.0)
    prior = np.zeros((24, 3), np.float32)

    def loss(keys):
        votes = np.exp(5.5 * (z @ keys.T - 1)) * (1 - np.eye(30))
        logits = votes @ np.eye(3)[target]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return -np.log(p[np.arange(30), target]).mean()

    tuned = fit_head(z, target, "tuned_cache", prior=prior)
    assert loss(tuned.keys) < loss(z) - 0.01
    assert 1e-3 < np.abs(tuned.keys - z).max() <= 0.11  # 100 steps of 1e-3 at most


def test_a_custom_penalty(model):
    z, target = clusters()
    prior = np.random.default_rng(1).standard_normal((24, 3)).astype(np.float32)
    for method, given, used in (
        ("linear", None, 1.0),
        ("linear", 7.0, 7.0),
        ("anchored", None, anchored_l2(20, 9.0, 24)),
        ("anchored", 7.0, 7.0),
    ):
        head = fit_head(z, target, method, given, prior, scale=9.0)
        expected = fit_linear(z, target, used, prior if method == "anchored" else None)
        np.testing.assert_array_equal(head.weight, expected[0])
    with pytest.raises(ConfigError, match="'anchored' starts from zero-shot weights"):
        fit_head(z, target, "anchored")
    assert fit_head(z, target, "linear", classes=5).weight.shape == (24, 5)


def test_a_penalty_chosen_on_validation_images(model, paint):
    def colours(seed):
        return [paint(c, noise=250, seed=seed + i) for i, c in enumerate(COLOURS * 4)]

    train, other = colours(0), colours(50)
    made = FewShotClassifier.fit(model, train, COLOURS * 4, validation=(iter(other), COLOURS * 4))
    target = np.array([sorted(COLOURS).index(c) for c in COLOURS * 4])
    z, against = model.encode_image(train), model.encode_image(other)
    (weight, _), l2 = fit_swept(z, target, against, target)
    np.testing.assert_array_equal(made.head.weight, weight)
    np.testing.assert_array_equal(weight, fit_linear(z, target, l2)[0])
    own = FewShotClassifier.fit(model, train, COLOURS * 4, l2=3.0, validation=(other, COLOURS * 4))
    np.testing.assert_array_equal(own.head.weight, fit_linear(z, target, 3.0)[0])
    # Of equally good penalties the largest is chosen: here all separate the classes.
    z, target = clusters(spread=0.05)
    assert fit_swept(z, target, z, target, (0.1, 10.0, 1.0))[1] == 10.0


@pytest.mark.parametrize("method", METHODS)
def test_heads_learn_from_four_images_each(model, paint, method):
    labels = COLOURS * 4
    images = [paint(c, noise=60, seed=i) for i, c in enumerate(labels)]
    zero_shot = ZeroShotClassifier(model, sorted(COLOURS))
    classify = FewShotClassifier.fit(model, images, labels, method, zero_shot=zero_shot)
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
    one = ZeroShotClassifier(model, ["a"])
    with pytest.raises(ConfigError, match=r"1 class\(es\)"):
        FewShotClassifier.fit(model, images, ["a", "a"], "cache", zero_shot=one)
    with pytest.raises(ConfigError, match=r"0 class\(es\)"):
        FewShotClassifier.fit(model, [], [])
    with pytest.raises(ConfigError, match="must be texts"):
        FewShotClassifier.fit(model, images, [0, 1])
    with pytest.raises(ConfigError, match="method is 'svm'"):
        FewShotClassifier.fit(model, images, ["a", "b"], method="svm")
    with pytest.raises(ConfigError, match="l2 is 0"):
        FewShotClassifier.fit(model, images, ["a", "b"], l2=0)
    with pytest.raises(ConfigError, match="'anchored' starts from zero_shot"):
        FewShotClassifier.fit(model, images, ["a", "b"], "anchored")
    known = ZeroShotClassifier(model, ["a", "c"])
    with pytest.raises(ConfigError, match="label 'b' is none of the 2 classes"):
        FewShotClassifier.fit(model, images, ["a", "b"], "cache", zero_shot=known)
    with pytest.raises(ConfigError, match="no validation images"):
        fit_swept(np.eye(2, 4), np.arange(2), np.zeros((0, 4)), np.arange(0))


def test_the_anchored_optimum(model):
    """The gradient of the penalised objective, by the textbook formula in float64."""
    z, target = clusters()
    prior = 3 * np.random.default_rng(1).standard_normal((24, 3)).astype(np.float32)
    weight, bias = fit_linear(z, target, 5.0, prior, tolerance=1e-9)
    assert not bias.any()
    scale = np.sqrt(24)
    fit, _ = gradients(z, target, weight, bias, 1e-12)
    assert np.abs(fit + 5.0 / 60 * (weight - prior) / scale).max() < 3e-5
    firm, _ = fit_linear(z, target, 1e6, prior)
    np.testing.assert_allclose(firm, prior, atol=1e-2)


def digits(seed=0):
    """Digits of scikit-learn, and class embeddings made of others, moved by a pixel."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x, y = data.images[order], data.target[order]
    mean = x.mean(0)

    def unit(rows):
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    moved = np.roll(x[:300], 1, axis=2) - mean
    classes = unit(np.stack([moved[y[:300] == c].mean(0).ravel() for c in range(10)]))
    return unit((x[300:] - mean).reshape(-1, 64)), y[300:], classes


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_anchored_is_never_below_zero_shot(shots):
    z, y, classes = digits()
    prior = 50 * classes.T
    zero, anchored = [], []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(y))
        train, test = order[:700], order[700:]
        chosen = np.concatenate([train[y[train] == c][:shots] for c in range(10)])
        for found, logits in (
            (zero, z[test] @ prior),
            (
                anchored,
                fit_head(z[chosen], y[chosen], "anchored", prior=prior, scale=50.0)(z[test]),
            ),
        ):
            found.append((logits.argmax(1) == y[test]).mean())
    assert np.mean(anchored) > np.mean(zero) + 0.02


@pytest.mark.peers
def test_the_plain_probe_agrees_with_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    z, y, _ = digits()
    weight, bias = fit_linear(z[:700], y[:700], 1.0)
    peer = linear.LogisticRegression(C=1.0, max_iter=5000, tol=1e-6).fit(8 * z[:700], y[:700])
    ours = (z[700:] @ weight + bias).argmax(1)
    assert abs((ours == y[700:]).mean() - peer.score(8 * z[700:], y[700:])) <= 0.003
    _, l2 = fit_swept(z[:500], y[:500], z[500:700], y[500:700], (1.0, 1e6))
    assert l2 == 1.0  # so large a penalty keeps the class frequencies


@pytest.mark.parametrize("method", ["anchored", "cache"])
def test_a_saved_head_gives_the_same_logits(model, make_model, paint, method, tmp_path):
    labels = COLOURS * 2
    images = [paint(c, noise=60, seed=i) for i, c in enumerate(labels)]
    zero_shot = ZeroShotClassifier(model, COLOURS)
    made = FewShotClassifier.fit(model, images, labels, method, zero_shot=zero_shot)
    made.save(tmp_path / "head.safetensors")
    found = load_classifier(tmp_path / "head.safetensors", model)
    assert found.labels == made.labels
    np.testing.assert_array_equal(found(images).logits, made(images).logits)
    with pytest.raises(CheckpointError, match="embeds differently"):
        load_classifier(tmp_path / "head.safetensors", make_model(seed=1))
    with pytest.raises(CheckpointError, match="is not a zero-shot classifier"):
        ZeroShotClassifier.load(tmp_path / "head.safetensors", model)
    made.labels = made.labels[1:]
    made.save(tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="the numbers of weights and labels differ"):
        load_classifier(tmp_path / "short.safetensors", model)
    zero_shot.save(tmp_path / "words.safetensors")
    assert load_classifier(tmp_path / "words.safetensors", model).labels == zero_shot.labels


def test_files_that_are_not_classifiers(model, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    held = {"a": np.ones(2, np.float32)}
    numpy.save_file(held, tmp_path / "bare")
    numpy.save_file(held, tmp_path / "other", {"format": "pt"})
    numpy.save_file(held, tmp_path / "newer", {"vlm oracle": "{}"})
    (tmp_path / "corrupt").write_bytes(b"corrupt")
    for name, match in {
        "bare": "bare is not a saved classifier: give",
        "other": "other is not a saved classifier: give",
        "corrupt": r"corrupt is not a saved classifier \(.+\): give",
        "missing": r"missing is not a saved classifier \(.+\): give",
        "newer": "newer is a vlm oracle, which this vlm does not support: update it",
    }.items():
        with pytest.raises(CheckpointError, match=match):
            load_classifier(tmp_path / name, model)
