"""Prompts and zero-shot classification."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlm.errors import ConfigError, DataError
from vlm.heads.prompts import TEMPLATES, class_embeddings, class_prompts, normalise
from vlm.heads.zero_shot import Classification, ZeroShotClassifier, to_scores

LABELS = ["red", "green", "blue"]


def test_shipped_templates_all_take_a_label():
    for name, templates in TEMPLATES.items():
        prompts = class_prompts(["teapot"], templates)["teapot"]
        assert len(set(prompts)) == len(templates), name
        assert all("teapot" in p and "{}" not in p for p in prompts), name


def test_class_embedding_is_the_renormalised_mean_of_its_prompts(model, monkeypatch):
    monkeypatch.setattr("vlm.heads.prompts.CHUNK", 3)  # a label's prompts fall in several chunks
    z = class_embeddings(model, LABELS, TEMPLATES["clip_best"])
    for row, label in zip(z, LABELS, strict=True):
        mean = model.encode_text([t.replace("{}", label) for t in TEMPLATES["clip_best"]]).mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_braces_in_labels_are_text():
    assert class_prompts(["{0} {x}"], ["a {}."]) == {"{0} {x}": ("a {0} {x}.",)}


def test_logits_are_scale_times_cosine_plus_bias(model, paint):
    model.logit_scale, model.logit_bias = 7.0, -3.0
    result = ZeroShotClassifier(model, LABELS)([paint("red"), paint("blue")])
    cosine = model.encode_image([paint("red"), paint("blue")]) @ class_embeddings(model, LABELS).T
    np.testing.assert_allclose(result.logits, 7 * cosine - 3, atol=1e-5)


def test_a_classifier_finds_the_colour(model, paint, tmp_path):
    classify = ZeroShotClassifier(model, LABELS, templates=TEMPLATES["clip_best"])
    path = tmp_path / "sea.png"
    paint("blue").save(path)
    result = classify([paint("red"), np.asarray(paint("green")), path, str(path)])
    assert [row[0][0] for row in result.top(1)] == ["red", "green", "blue", "blue"]
    assert all(len(row) == 3 for row in result.top(99))
    assert all(row == sorted(row, key=lambda x: -x[1]) for row in result.top(3))


@pytest.mark.parametrize("form", ["pil", "path", "str", "array", "batch"])
def test_one_image_is_accepted_in_every_form(model, paint, tmp_path, form):
    image = paint("green")
    path = tmp_path / "a.png"
    image.save(path)
    pixels = np.asarray(image)
    forms = {"pil": image, "path": path, "str": str(path), "array": pixels, "batch": pixels[None]}
    result = ZeroShotClassifier(model, LABELS)(forms[form])
    assert result.logits.shape == (1, 3)
    assert result.top(1)[0][0][0] == "green"


def test_a_stream_is_drawn_once_and_in_order(model, paint):
    colours = ["red", "blue", "green"] * 20
    result = ZeroShotClassifier(model, LABELS)(paint(c) for c in colours)
    assert [row[0][0] for row in result.top(1)] == colours
    assert model.seen == 60


def test_a_mapping_has_its_own_sentences(model, paint):
    classify = ZeroShotClassifier(model, {"warm": ["red", "yellow paint"], "cold": ["blue"]})
    assert classify.labels == ("warm", "cold")
    assert classify([paint("blue")]).top(1)[0][0][0] == "cold"
    np.testing.assert_allclose(classify.z_labels[1], model.encode_text(["blue"])[0], atol=1e-6)


@given(hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e4, 1e4, width=32)))
def test_scores_are_probabilities_in_the_order_of_the_logits(logits):
    softmax, sigmoid = to_scores(logits, "softmax"), to_scores(logits, "sigmoid")
    np.testing.assert_allclose(softmax.sum(1), 1, rtol=1e-5)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-logits.astype(np.float64))), atol=1e-6)
    for scores in (softmax, sigmoid):
        ranked = np.take_along_axis(scores, np.argsort(logits, axis=1), axis=1)
        assert (np.diff(ranked, axis=1) >= 0).all()


def test_sigmoid_scores_do_not_depend_on_the_other_labels(model, paint):
    model.loss, model.logit_bias = "sigmoid", -10.0
    few = ZeroShotClassifier(model, ["red", "green"])(paint("blue"))
    many = ZeroShotClassifier(model, [*LABELS, "yellow", "red"[::-1]])(paint("blue"))
    np.testing.assert_allclose(few.scores, many.scores[:, :2], rtol=1e-5)
    assert few.scores.max() < 0.5  # nothing fits, so all scores are low


def test_all_labels_of_at_least_a_score():
    found = Classification(("a", "b"), np.array([[0, 0], [-1, 1]], np.float32), "softmax")
    assert found.above() == [[("a", 0.5), ("b", 0.5)], [("b", pytest.approx(0.8808, abs=1e-4))]]
    assert [len(row) for row in found.above(0.1)] == [2, 2]
    many = Classification(tuple("abcdefg"), np.zeros((1, 7), np.float32), "softmax")
    assert [label for label, _ in many.top()[0]] == list("abcde")


def test_images_that_cannot_be_read_are_reported_and_left_out(model, paint, tmp_path):
    (tmp_path / "corrupt.png").write_bytes(b"corrupt")
    colours = ["red", "green", "blue"] * 5
    pictures = [paint(colour) for colour in colours]
    pictures[1] = tmp_path / "corrupt.png"
    unread = []
    result = ZeroShotClassifier(model, LABELS)(
        pictures, batch_size=4, on_error=lambda at, error: unread.append((at, type(error)))
    )
    assert unread == [(1, DataError)]
    assert [row[0][0] for row in result.top(1)] == [colours[0], *colours[2:]]
    # A dozen are kept for display, without the corrupt one.
    assert len(result.images) == 12
    assert result.images[0] is pictures[0]
    assert result.images[1] is pictures[2]


def test_displays(model, paint):
    model.name = "<colours>"
    result = ZeroShotClassifier(model, ["red", "<b>blue</b>"])([paint("red")] * 15)
    assert "15 images over 2 labels (softmax)" in repr(result)
    page = result._repr_html_()
    assert page.count("<img") == 12
    assert "and 3 more" in page
    assert "<b>" not in page  # labels are escaped
    assert "&lt;b&gt;blue" in page
    assert "2 labels: red" in repr(ZeroShotClassifier(model, ["red", "blue"]))
    bare = Classification(("a", "b"), np.zeros((2, 2), np.float32), "softmax")
    assert "0.500" in bare._repr_html_()


def test_an_unreadable_picture_does_not_break_the_display(model, paint, tmp_path):
    path = tmp_path / "gone.png"
    paint("red").save(path)
    result = ZeroShotClassifier(model, LABELS)([path])
    path.unlink()
    assert "red" in result._repr_html_()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["a {}."], "no labels"),
        ({}, ["a {}."], "no labels"),
        (["cat", "cat"], ["a {}."], "'cat' is given twice"),
        ("cat,dog", ["a {}."], "'cat,dog': give a list"),
        (["cat", " "], ["a {}."], "' ' is not a name"),
        (["cat", 3], ["a {}."], "3 is not a name"),
        (["cat"], ["a photo"], "'a photo' has no place"),
        (["cat"], [], "no templates"),
        (["cat"], "a {}.", "give a list"),
        ({"cat": "a cat"}, ["a {}."], "the prompts of label 'cat'"),
        ({"cat": []}, ["a {}."], "the prompts of label 'cat'"),
    ],
)
def test_bad_labels_and_templates(model, labels, templates, message):
    with pytest.raises(ConfigError, match=message):
        ZeroShotClassifier(model, labels, templates)


@pytest.mark.untyped
def test_bad_use(model, paint):
    classify = ZeroShotClassifier(model, LABELS)
    with pytest.raises(ConfigError, match="no images"):
        classify([])
    with pytest.raises(DataError, match="images is a int"):
        classify(3)
    with pytest.raises(ConfigError, match="k is 0"):
        classify(paint("red")).top(0)
    with pytest.raises(ConfigError, match="rule is 'max'"):
        to_scores(np.zeros((1, 2)), "max")
    with pytest.raises(DataError, match=r"length is 0\.0"):
        normalise(np.zeros((1, 4)), "it")
    with pytest.raises(DataError, match="length is nan"):
        normalise(np.full((1, 4), np.nan), "it")
