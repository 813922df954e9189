"""The restyling of drawings that methods are measured on, and what its command calls a miss."""

import numpy as np
import restyled
from PIL import Image, ImageDraw

from vlm.evaluation.intervals import proportion


def drawing(colour):
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill=colour, outline="black")
    return picture


def test_a_style_that_is_never_twice_the_same_but_for_a_seed():
    picture = drawing((230, 40, 40))
    first, again = (restyled.restyle(picture, np.random.default_rng(0)) for _ in range(2))
    other = restyled.restyle(picture, np.random.default_rng(1))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    assert np.abs(np.asarray(first, int) - np.asarray(other, int)).mean() > 3
    paper = np.asarray(first, int)[:6].mean((0, 1))
    assert (paper < 252).all()
    assert paper[0] > paper[2], "the paper is brown"


def test_colours_turn_around_grey():
    matrix = restyled.turn(0.3)
    np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-3)
    np.testing.assert_allclose(restyled.turn(0.0), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(matrix @ restyled.turn(0.7), np.eye(3), atol=2e-2)


def test_what_is_missed_is_named():
    base, kept = proportion(200, 400), proportion(360, 400)
    well = {
        (1, "zero-shot"): (base, kept),
        (1, "probe"): (proportion(204, 400), kept),
        (2, "zero-shot"): (base, kept),
        (2, "full, half"): (proportion(260, 400), proportion(352, 400)),
    }
    assert restyled.verdicts(well) == []
    badly = well | {
        (1, "probe"): (proportion(199, 400), kept),
        (2, "full, half"): (proportion(210, 400), proportion(340, 400)),
    }
    assert restyled.verdicts(badly) == [
        "probe at 1 shot is below zero-shot",
        "full, half at 2 shots is not above zero-shot by its interval",
        "full, half at 2 shots keeps 94.4%",
    ]
