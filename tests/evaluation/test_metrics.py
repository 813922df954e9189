"""Metrics against brute force, closed forms and the properties that define them."""

import math
import tracemalloc

import numpy as np
import pytest
from class_metrics import classification_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from vlm.errors import ConfigError, DataError
from vlm.evaluation import intervals, metrics
from vlm.evaluation.intervals import mean, proportion
from vlm.evaluation.metrics import (
    best_ranks,
    caption_ranks,
    pair_retrieval_metrics,
    zero_shot_metrics,
)


def unit(rng, n, d):
    z = rng.standard_normal((n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def brute_ranks(z_query, z_key, pairs):
    """The definition, one query at a time, over the full matrix."""
    scores = z_query.astype(np.float64) @ z_key.astype(np.float64).T
    ranks = []
    for i, row in enumerate(scores):
        right = [k for q, k in pairs if q == i]
        wrong = [k for k in range(len(z_key)) if k not in right]
        best = max((row[k] for k in right), default=None)
        ranks.append(-1 if best is None else sum(row[k] >= best for k in wrong))
    return np.array(ranks)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), blocks=st.sampled_from([(1, 1), (3, 5), (64, 64)]))
def test_ranks_equal_the_definition_in_any_blocks(seed, blocks):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 12, 2)
    z_query, z_key = unit(rng, n, 6), unit(rng, m, 6)
    pairs = np.argwhere(rng.random((n, m)) < 0.3)
    rng.shuffle(pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "QUERY_BLOCK", blocks[0])
        patch.setattr(metrics, "KEY_BLOCK", blocks[1])
        ranks = best_ranks(z_query, z_key, pairs)
    np.testing.assert_array_equal(ranks, brute_ranks(z_query, z_key, pairs))


def test_worked_zero_shot():
    z_captions = np.eye(3, dtype=np.float32)
    z_image = np.array([[0.9, 0.4, 0.1], [0.9, 0.4, 0.1], [0.9, 0.4, 0.1], [0.1, 0.4, 0.9]])
    result = zero_shot_metrics(z_image, z_captions, np.array([0, 1, 2, 2]), ks=(1, 2, 3))
    assert {name: metric.value for name, metric in result.items()} == {
        "top1": 0.5,
        "top2": 0.75,
        "top3": 1.0,
    }
    assert result["top1"].n == 4


def test_recall_counts_a_query_once_however_many_positives():
    z_image = np.eye(2, dtype=np.float32)
    z_text = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.8, 0.3]], np.float32)  # two texts per image
    pairs = np.array([[0, 0], [0, 1], [1, 2], [1, 3]])
    recall = pair_retrieval_metrics(z_image, z_text, pairs, ks=(1,))
    assert recall["image_to_text_R@1"].value == 1.0
    assert recall["image_to_text_R@1"].n == 2
    assert recall["text_to_image_R@1"].value == 0.75  # text 3 is nearer to image 0
    assert recall["text_to_image_R@1"].n == 4


def test_distractors_are_answers_but_not_queries():
    z = np.eye(3, dtype=np.float32)
    recall = pair_retrieval_metrics(z[:2], z, np.array([[0, 0], [1, 1]]), ks=(1,))
    assert recall["text_to_image_R@1"].n == 2
    assert recall["image_to_text_R@1"].value == 1.0


def test_default_pairs_are_the_diagonal():
    rng = np.random.default_rng(0)
    z_image, z_text = unit(rng, 40, 4), unit(rng, 40, 4)
    diagonal = np.repeat(np.arange(40)[:, None], 2, axis=1)
    assert pair_retrieval_metrics(z_image, z_text) == pair_retrieval_metrics(
        z_image, z_text, diagonal
    )


def test_a_collapsed_model_scores_zero_not_chance_and_not_all():
    """Rounding moves equal cosines by 1e-7 depending on the tile; that must not break the tie."""
    z = np.repeat(unit(np.random.default_rng(0), 1, 511), 100, axis=0)
    assert zero_shot_metrics(z, z, np.arange(100))["top5"].value == 0
    assert pair_retrieval_metrics(z, z)["image_to_text_R@10"].value == 0
    assert classification_metrics(np.zeros((5, 7)), np.arange(5))["top1"].value == 0


def test_memory_is_bounded_by_a_tile():
    """The full matrix of similarities would take 240 MB; a tile and its comparison take 40."""
    rng = np.random.default_rng(0)
    z_image, z_text = unit(rng, 3000, 4), unit(rng, 20_000, 4)
    positives = np.stack([rng.integers(0, 3000, 20_000), np.arange(20_000)], axis=1)
    tracemalloc.start()
    pair_retrieval_metrics(z_image, z_text, positives)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90e6


# ------------------------------------------------------------------------------- intervals


def test_worked_values_of_a_proportion():
    """Wilson's of 30 of 50 by its formula; of 8 of 10, with so few misses, the exact one."""
    metric = proportion(30, 50)
    assert (metric.low, metric.high) == pytest.approx((0.4618, 0.7239), abs=1e-4)
    metric = proportion(8, 10)
    exact = binomtest(8, 10).proportion_ci(method="exact")
    assert (metric.low, metric.high) == pytest.approx((exact.low, exact.high), abs=1e-6)


@given(n=st.integers(1, 10_000), share=st.floats(0, 1))
def test_bounds_are_wilsons_or_the_exact_ones(n, share):
    hits = round(share * n)
    metric, test = proportion(hits, n), binomtest(hits, n)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1
    found = [test.proportion_ci(method="wilson")]
    if min(hits, n - hits) <= intervals.FEW:
        found.append(test.proportion_ci(method="exact"))
    assert metric.low == pytest.approx(min(f.low for f in found), abs=1e-7)
    assert metric.high == pytest.approx(max(f.high for f in found), abs=1e-7)


def test_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).exponential(size=2000)
    metric = mean(values)
    half = intervals.Z95 * values.std() / math.sqrt(len(values))
    assert metric.low == pytest.approx(values.mean() - half, abs=0.01 * half)
    assert metric.high == pytest.approx(values.mean() + half, abs=0.01 * half)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.untyped
def test_bad_input_is_named():
    z = np.eye(3, dtype=np.float32)
    broken = z.copy()
    broken[1, 1] = np.nan
    with pytest.raises(DataError, match=r"z_image has 1 of 3 rows that are not finite.*at 1"):
        zero_shot_metrics(broken, z, np.arange(3))
    with pytest.raises(DataError, match="target 3 of image 2"):
        zero_shot_metrics(z, z, np.array([0, 1, 3]))
    with pytest.raises(DataError, match="target -1 of image 0"):
        classification_metrics(z, np.array([-1, 1, 2]))
    with pytest.raises(DataError, match="3 integers"):
        zero_shot_metrics(z, z, np.array([0.0, 1.0, 2.0]))
    with pytest.raises(DataError, match="3 and 2 dimensions"):
        zero_shot_metrics(z, z[:, :2], np.arange(3))
    with pytest.raises(DataError, match="not empty"):
        zero_shot_metrics(z[:0], z, np.arange(0))
    with pytest.raises(DataError, match="3 images and 2 texts"):
        pair_retrieval_metrics(z, z[:2])
    with pytest.raises(DataError, match="positives name row 9"):
        pair_retrieval_metrics(z, z, np.array([[0, 9]]))
    with pytest.raises(DataError, match="integer pairs"):
        pair_retrieval_metrics(z, z, np.arange(3))
    with pytest.raises(ConfigError, match="k is 0"):
        zero_shot_metrics(z, z, np.arange(3), ks=(0,))
    with pytest.raises(DataError, match="not finite"):
        classification_metrics(broken, np.arange(3))
    with pytest.raises(DataError, match="zero trials"):
        proportion(0, 0)
    with pytest.raises(DataError, match="finite numbers"):
        mean(np.array([]))
    with pytest.raises(DataError, match="one cluster"):
        mean(np.ones(3), np.zeros(3, int))


def test_of_classes_with_one_name_the_first_comes_first():
    """As `argmax` and CLIP_benchmark have it; ties between other classes are misses."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4, 8)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    z_captions = z[[0, 1, 1, 2, 1]]  # "missile" is the second, third and fifth class
    names = ["tench", "missile", "missile", "crane", "missile"]
    target = np.array([0, 1, 2, 4])
    z_image = z[[0, 1, 1, 1]]
    assert caption_ranks(z_image, z_captions, target, names).tolist() == [0, 0, 1, 2]
    assert caption_ranks(z_image, z_captions, target).tolist() == [0, 2, 2, 2]
    scores = z_image @ z_captions.T
    order = np.argsort(-scores.round(5), axis=1, kind="stable")
    first = [row.tolist().index(t) for row, t in zip(order, target, strict=True)]
    assert caption_ranks(z_image, z_captions, target, names).tolist() == first
    found = zero_shot_metrics(z_image, z_captions, target, (1, 3), names)
    assert [found[name].value for name in ("top1", "top3")] == [0.5, 1.0]
