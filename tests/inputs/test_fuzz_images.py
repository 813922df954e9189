"""A few hundred of the mutated files of `tests/fuzz/images.py`, which runs ten thousand."""

import importlib.util
import io
import pathlib
import warnings

import numpy as np
import pytest
from PIL import Image

FILE = pathlib.Path(__file__).parents[1] / "fuzz" / "images.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_images", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutated_files_are_as_strict_pillow_has_them_or_refused(fuzz):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {n: fuzz.outcome(fuzz.case(n)[2], lenient=n // 5 % 2 == 1) for n in range(400)}
    assert {n: text for n, text in found.items() if text.startswith("WRONG")} == {}
    counts = {text: list(found.values()).count(text) for text in set(found.values())}
    assert min(counts["equal"], counts["refused"]) > 50


def test_the_comparison_sees_half_an_image(fuzz, monkeypatch):
    whole = fuzz.originals()["PNG"][1]
    assert fuzz.outcome(whole) == "equal"

    def black(data, name):
        return Image.new("RGB", Image.open(io.BytesIO(data)).size)

    monkeypatch.setattr(fuzz, "strict", lambda data: np.ones((40, 48, 3), np.uint8))
    monkeypatch.setattr(fuzz, "open_image", black)
    assert fuzz.outcome(whole).startswith("WRONG: other pixels")
    monkeypatch.setattr(fuzz, "strict", lambda data: None)
    assert fuzz.outcome(whole).startswith("WRONG: decodes what strict Pillow refuses")
