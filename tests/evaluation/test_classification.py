"""Metrics beside the functions of CLIP_benchmark and scikit-learn, on the same features."""

import importlib

import numpy as np
import pytest
from class_metrics import classification_metrics

from vlm.errors import DataError
from vlm.evaluation.classification import (
    calibration_error,
    confusion,
    mean_average_precision,
    reliability,
)
from vlm.evaluation.metrics import (
    clusters,
    pair_retrieval_metrics,
    selection_hits,
    selection_metrics,
)


def unit(rng, *shape):
    z = rng.standard_normal(shape).astype(np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def scored():
    """Logits of 500 images over 12 classes of unequal size, right about half of the time."""
    rng = np.random.default_rng(0)
    target = rng.choice(12, 500, p=np.arange(1, 13) / 78)
    logits = rng.standard_normal((500, 12)) + 1.8 * np.eye(12)[target]
    return logits.astype(np.float32), target


def test_worked_values():
    logits = np.array([[3, 1, 0], [0, 2, 1], [1, 0, 5], [2, 9, 0.0]])
    target = np.array([0, 1, 2, 0])
    found = classification_metrics(logits, target, ks=(1, 2))
    assert found["top1"].value == 0.75
    assert found["top2"].value == 1
    assert found["mean_per_class_recall"].value == pytest.approx((0.5 + 1 + 1) / 3)
    assert confusion(np.array([0, 1, 2, 1]), target, 3).tolist() == [
        [1, 1, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]
    # Ranked best first: right, wrong, right. Precision 1 at recall 1/2, 2/3 at 1.
    scores, relevant = np.array([[3.0], [2.0], [1.0]]), np.array([[1], [0], [1]], bool)
    assert mean_average_precision(scores, relevant).value == pytest.approx((1 + 2 / 3) / 2)
    # 0.75 and 0.95 sure, one right and one wrong: gaps of 0.25 and 0.95.
    sure, right = np.array([0.75, 0.95]), np.array([True, False])
    assert reliability(sure, right) == [(0.75, 1.0, 1), (0.95, 0.0, 1)]


def test_ties_count_as_misses():
    found = classification_metrics(np.zeros((6, 6)), np.arange(6))
    assert found["top1"].value == found["top5"].value == found["mean_per_class_recall"].value == 0
    z = np.ones((4, 2, 3), np.float32)
    assert {m.value for m in selection_metrics(selection_hits(z, z)).values()} == {0.0}


def test_average_precision_with_ties_agrees_with_scikit_learn(scored):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    for scores in (rng.integers(0, 5, (300, 8)).astype(np.float32), rng.standard_normal((300, 8))):
        relevant = rng.random((300, 8)) < 0.3
        expected = sklearn.average_precision_score(relevant, scores, average="macro")
        found = mean_average_precision(scores, relevant)
        assert found.value == pytest.approx(expected, abs=1e-6)
        assert found.low < found.value < found.high


def test_calibration_agrees_with_scikit_learn(scored):
    calibration = pytest.importorskip("sklearn.calibration")
    logits, target = scored
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right, sure = p.argmax(1) == target, p.max(1)
    share, mean = calibration.calibration_curve(right, sure, n_bins=15)
    rows = reliability(sure, right)
    np.testing.assert_allclose([row[1] for row in rows], share, atol=1e-6)
    np.testing.assert_allclose([row[0] for row in rows], mean, atol=1e-6)
    # Without its bias the error is less, and with many images next to the same.
    error = sum(abs(row[1] - row[0]) * row[2] for row in rows) / len(p)
    assert 0 <= calibration_error(sure, right).value < error
    many = calibration_error(np.tile(sure, 400), np.tile(right, 400)).value
    assert many == pytest.approx(error, abs=2e-3)


@pytest.fixture(scope="module")
def peer():
    """CLIP_benchmark's modules of metrics (the extra `peers`)."""
    pytest.importorskip("clip_benchmark")
    names = ("zeroshot_classification", "zeroshot_retrieval", "image_caption_selection")
    return {name: importlib.import_module(f"clip_benchmark.metrics.{name}") for name in names}


class Stand:
    """A model for CLIP_benchmark's loops: images and texts are their embeddings already."""

    def encode_image(self, images):
        return images.reshape(len(images), -1)

    encode_text = encode_image


@pytest.mark.peers
def test_classification_agrees_with_clip_benchmark(peer, monkeypatch):
    import torch

    rng = np.random.default_rng(2)
    z, classes = unit(rng, 400, 32), unit(rng, 11, 32)
    target = rng.integers(0, 11, 400)
    loader = [(torch.tensor(z), torch.tensor(target))]
    module = peer["zeroshot_classification"]
    # Its accuracy makes a number of an array of one element, which NumPy no longer allows.
    monkeypatch.setattr(module, "float", lambda x: np.asarray(x).item(), raising=False)
    logits, _ = module.run_classification(Stand(), torch.tensor(classes.T), loader, "cpu", False)
    acc1, acc5 = module.accuracy(logits, torch.tensor(target), topk=(1, 5))
    found = classification_metrics(100 * z @ classes.T, target)
    assert found["top1"].value == pytest.approx(acc1, abs=1e-6)
    assert found["top5"].value == pytest.approx(acc5, abs=1e-6)
    recall = module.balanced_accuracy_score(target, logits.argmax(1))
    assert found["mean_per_class_recall"].value == pytest.approx(recall, abs=1e-6)
    relevant = rng.random((400, 11)) < 0.2
    relevant[:, 3] = False  # a class that no image shows
    expected = module.average_precision_per_class(logits, torch.tensor(relevant)).mean().item()
    assert mean_average_precision(logits.numpy(), relevant).value == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.peers
def test_retrieval_agrees_with_clip_benchmark(peer):
    import torch

    rng = np.random.default_rng(3)
    images = unit(rng, 60, 16)
    counts = rng.integers(1, 6, 60)
    owner = np.repeat(np.arange(60), counts)
    texts = unit(rng, len(owner), 16) + 1.2 * images[owner]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    batches = [
        (torch.tensor(images[i : i + 20]), [list(texts[owner == j]) for j in range(i, i + 20)])
        for i in range(0, 60, 20)
    ]
    expected = peer["zeroshot_retrieval"].evaluate(
        Stand(), batches, lambda rows: torch.tensor(np.array(rows)), "cpu", False, [1, 5, 10]
    )
    pairs = np.stack([owner, np.arange(len(owner))], axis=1)
    found = pair_retrieval_metrics(images, texts, pairs)
    for k in (1, 5, 10):
        assert found[f"image_to_text_R@{k}"].value == pytest.approx(
            expected[f"text_retrieval_recall@{k}"], abs=1e-6
        )
        assert found[f"text_to_image_R@{k}"].value == pytest.approx(
            expected[f"image_retrieval_recall@{k}"], abs=1e-6
        )


@pytest.mark.peers
@pytest.mark.parametrize(("images", "captions"), [(2, 2), (1, 2)])
def test_selection_agrees_with_clip_benchmark(peer, images, captions):
    import torch

    rng = np.random.default_rng(4)
    z_image, z_text = unit(rng, 90, images, 16), unit(rng, 90, captions, 16)
    batch = torch.tensor(z_image).reshape(90, images, 1, 4, 4), [list(rows) for rows in z_text]
    expected = peer["image_caption_selection"].evaluate(
        Stand(), [batch], lambda rows: torch.tensor(np.array(rows)), "cpu", False
    )
    for name, metric in selection_metrics(selection_hits(z_image, z_text)).items():
        assert metric.value == pytest.approx(expected[name], abs=1e-6)


def test_the_captions_of_an_image_are_one_cluster():
    pairs = np.array([[0, 0], [0, 1], [1, 2], [2, 3], [2, 4]])
    groups = clusters(pairs[:, ::-1], 5, 3)
    assert groups[0] == groups[1]
    assert groups[3] == groups[4]
    assert len({groups[0], groups[2], groups[3]}) == 3
    assert len(set(clusters(pairs, 3, 5))) == 3
    z = np.eye(8, dtype=np.float32)
    doubled = np.repeat(np.arange(4), 2)
    pairs = np.stack([doubled, np.arange(8)], axis=1)
    found = pair_retrieval_metrics(z[doubled][::2], z[doubled], pairs, ks=(1,))
    wide, narrow = found["text_to_image_R@1"], found["image_to_text_R@1"]
    assert (wide.n, narrow.n) == (8, 4)
    assert wide.low == narrow.low  # eight captions of four images are worth four


@pytest.mark.untyped
def test_bad_input():
    with pytest.raises(DataError, match="give one for each image and class"):
        mean_average_precision(np.zeros((3, 2)), np.zeros((2, 2), bool))
    with pytest.raises(DataError, match="not finite"):
        calibration_error(np.full(2, np.nan), np.array([True, False]))
    with pytest.raises(DataError, match="the same number of instances"):
        selection_hits(np.zeros((3, 2, 4)), np.zeros((2, 2, 4)))
