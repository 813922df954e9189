"""k-NN classification, with and without a zero-shot classifier."""

import numpy as np
import pytest

from vlm.errors import ConfigError
from vlm.heads.neighbours import NeighbourClassifier
from vlm.heads.retrieval import RetrievalIndex
from vlm.heads.zero_shot import ZeroShotClassifier

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture
def index(model, paint):
    index = RetrievalIndex(model)
    labels = COLOURS * 5
    pictures = [paint(c, noise=40, seed=i) for i, c in enumerate(labels)]
    metadata = {"label": labels, "caption": [f"a wall in {c}" for c in labels]}
    index.add(pictures, metadata=metadata)
    index.add([paint("white")], ids=["unlabelled"])
    return index


def test_neighbours_vote_with_their_weights(index, model, paint):
    classify = NeighbourClassifier(index, "label", k=3)
    z = model.encode_image([paint("red")])
    hits = index.search(z[0], k=3)
    weights = np.exp(np.array([h.score for h in hits]) / 0.07)
    expected = dict.fromkeys(sorted(COLOURS), 0.0)
    for weight, hit in zip(weights / weights.sum(), hits, strict=True):
        expected[index.metadata(hit.id)["label"]] += weight
    np.testing.assert_allclose(classify.votes(z)[0], list(expected.values()), atol=1e-5)
    result = classify([paint(c, noise=20, seed=99) for c in COLOURS])
    assert [row[0][0] for row in result.top(1)] == COLOURS
    np.testing.assert_allclose(result.scores.sum(1), 1, atol=1e-5)
    assert "4 labels, 3 neighbours" in repr(classify)


@pytest.mark.parametrize("evidence", ["label", "caption"])
def test_combined_with_zero_shot(index, model, paint, evidence):
    zero_shot = ZeroShotClassifier(model, COLOURS)
    z = model.encode_image([paint(c, noise=60, seed=7) for c in COLOURS])
    column = evidence
    joined = NeighbourClassifier(
        index, column, 5, zero_shot, neighbour_weight=0.3, evidence=evidence
    )
    alone = joined.votes(z)
    np.testing.assert_allclose(alone.sum(1), 1, atol=1e-5)
    zero = np.exp(zero_shot.logits(z))
    expected = 0.3 * alone + 0.7 * zero / zero.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(joined.logits(z)), expected, atol=1e-5)
    assert joined.labels == tuple(COLOURS)


def test_the_weight_of_the_neighbours_from_none_to_all(index, model, paint):
    zero_shot = ZeroShotClassifier(model, COLOURS)
    z = model.encode_image([paint(c, noise=60, seed=7) for c in COLOURS])
    zero = np.exp(zero_shot.logits(z))
    zero /= zero.sum(1, keepdims=True)
    near = NeighbourClassifier(index, "label", zero_shot=zero_shot).votes(z)
    assert near.max() < 1  # 20 neighbours of five in each colour do not all agree
    for weight in (0, 0.5, 1):
        options = {} if weight == 0.5 else {"neighbour_weight": weight}
        joined = NeighbourClassifier(index, "label", zero_shot=zero_shot, **options)
        expected = weight * near + (1 - weight) * zero
        np.testing.assert_allclose(np.exp(joined.logits(z)), expected, atol=1e-5)
    assert "4 labels, 20 neighbours and zero-shot (0%)" in repr(joined)


@pytest.mark.parametrize("values", [["a", "b", None], ["a", "b", ""], [1, 2, None]])
def test_items_without_a_value_take_no_place_among_the_neighbours(model, values):
    index = RetrievalIndex(model)
    index.add(np.eye(3, 16, dtype=np.float32), metadata={"label": values})
    classify = NeighbourClassifier(index, "label", k=1)
    assert classify.labels == (str(values[0]), str(values[1]))
    query = np.array([[0.1, 0.2, 0.9, *np.zeros(13)]], np.float32)  # nearest to the third
    np.testing.assert_allclose(classify.votes(query), [[0, 1]])


def test_bad_neighbours(index, model):
    with pytest.raises(ConfigError, match="the index is empty"):
        NeighbourClassifier(RetrievalIndex(model), "label")
    with pytest.raises(ConfigError, match="no metadata column 'name'; it has caption, label"):
        NeighbourClassifier(index, "name")
    with pytest.raises(ConfigError, match="captions name no classes"):
        NeighbourClassifier(index, "caption", evidence="caption")
    with pytest.raises(ConfigError, match="'blue' of column 'label' is none"):
        NeighbourClassifier(index, "label", zero_shot=ZeroShotClassifier(model, ["red", "green"]))
    for bad in ({"neighbour_weight": 2}, {"neighbour_weight": -0.1}, {"temperature": 0}, {"k": 0}):
        with pytest.raises(ConfigError, match="k is at least 1, the temperature above 0"):
            NeighbourClassifier(index, "label", **bad)
    empty = RetrievalIndex(model)
    empty.add(np.eye(2, 16, dtype=np.float32), metadata={"label": [None, ""]})
    with pytest.raises(ConfigError, match="'label' has no values"):
        NeighbourClassifier(empty, "label")
