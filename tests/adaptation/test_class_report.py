"""The page of `vlm adapt`: accuracy by class, confusions and the most confident mistakes."""

import re

import numpy as np
import pytest
from PIL import Image

from vlm.adaptation.class_report import CONFUSIONS, MISTAKES, ClassReport
from vlm.adaptation.results import Row, reason, write_page
from vlm.evaluation.charts import MAX_CLASSES, confusion_chart
from vlm.evaluation.intervals import proportion


def report(target, predicted, confidence, names=("cat", "dog", "<b>fox"), images=None):
    target = np.asarray(target)
    images = images or [Image.new("RGB", (8, 8), (9 * i % 255, 0, 0)) for i in range(len(target))]
    return ClassReport(
        "test", names, target, np.asarray(predicted), np.asarray(confidence, np.float32), images
    )


def test_worked_values(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    images = [tmp_path / "a.png", "missing.png", *[Image.new("L", (5, 5))] * 4]
    made = report([0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1], [1, 0.9, 0.8, 1, 0.99, 1], images=images)
    cat, dog = made.rows()  # a class without images has no row
    assert (cat.name, cat.accuracy, cat.taken_for) == ("cat", proportion(1, 3), "dog (2)")
    assert (dog.name, dog.accuracy, dog.taken_for) == ("dog", proportion(2, 3), "cat (1)")
    assert made.confusions() == [("cat", "dog", 2, 3), ("dog", "cat", 1, 3)]
    # The most confident first, and a file that is gone is left out.
    mistakes = made.mistakes()
    assert [(m.target, m.predicted, round(m.confidence, 2)) for m in mistakes] == [
        ("dog", "cat", 0.99), ("cat", "dog", 0.8),
    ]  # fmt: skip
    assert all(m.picture.startswith("data:image/webp;base64,") for m in mistakes)


def test_everything_right_has_no_mistakes(tmp_path):
    made = report([0, 1, 2], [0, 1, 2], [1, 1, 1])
    assert made.mistakes() == made.confusions() == []
    rows = (
        Row("zero-shot", validation=proportion(1, 3)),
        Row("probe", validation=proportion(3, 3)),
    )
    write_page(tmp_path / "report.html", rows, "probe", {"model": "m", "data": "d"}, made)
    page = (tmp_path / "report.html").read_text()
    assert "There are no mistakes." in page
    assert "&lt;b&gt;fox" in page
    assert "<b>fox" not in page


@pytest.mark.parametrize("classes", [2, 3, 24, 31, 120, 200])
def test_the_page_stays_readable_and_small(tmp_path, classes):
    rng = np.random.default_rng(0)
    target = rng.integers(0, classes, 10 * classes)
    predicted = np.where(rng.random(len(target)) < 0.8, target, (target + 1) % classes)
    names = tuple(f"class number {i} with a name" for i in range(classes))
    noise = [Image.effect_noise((400, 300), 80) for _ in range(4)]
    images = [noise[i % 4] for i in range(len(target))]
    made = report(target, predicted, rng.random(len(target)), names, images)
    rows = (
        Row("zero-shot", validation=proportion(1, 9)),
        Row("probe", validation=proportion(8, 9)),
    )
    write_page(tmp_path / "report.html", rows, "probe", {"model": "m", "data": "d"}, made)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 1_000_000
    assert page.count('aria-label="confusion matrix"') == (1 if classes <= MAX_CLASSES else 2)
    assert page.count("<figure>") == min(MISTAKES, int((target != predicted).sum()))
    assert len(made.confusions()) == min(CONFUSIONS, classes)
    assert all(f"<tr><td>{name}</td>" in page for name in names)


def test_the_matrix_has_the_classes_of_the_most_frequent_mistakes():
    classes = 100
    target = np.repeat(np.arange(classes), 10)
    predicted = target.copy()
    predicted[:9] = 99  # nine images of class 0 are taken for class 99
    chart = confusion_chart(predicted, target, [f"c{i}" for i in range(classes)])
    assert "c0 predicted as c99: 9" in chart
    assert f"{classes - MAX_CLASSES} are not in the matrix" in chart
    count = re.findall(r"<text class=.count.[^>]*>(\d+)<", chart)
    assert sum(map(int, count)) == 10 * MAX_CLASSES


@pytest.mark.parametrize(
    ("best", "other", "explained"),
    [
        (90, 50, "The next is other with 50.0%."),
        (90, 88, "within the 95% interval: the difference is not significant"),
        (90, 90, "of equal methods, the one with the higher likelihood is chosen"),
    ],
)
def test_the_choice_is_explained(best, other, explained):
    rows = [Row("other", validation=proportion(other, 100)), Row("out", note="it takes 9 s"),
            Row("chosen", validation=proportion(best, 100))]  # fmt: skip
    sentence = reason(rows, "chosen")
    assert sentence.startswith("chosen has the best accuracy on the validation images: 90.0% [")
    assert explained in sentence
    assert "The next" not in reason(rows[2:], "chosen")
