"""Figures that CLIP_benchmark measured (golden/clip_benchmark, by its script) are vlm's."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from vlm.config import PreprocessConfig
from vlm.evaluation.results_folder import clip_benchmark_fields
from vlm.evaluation.runner import measure
from vlm.evaluation.suites import Missing, open_task
from vlm.inputs.preprocess import Preprocess

GOLDEN = Path(__file__).parent / "golden" / "clip_benchmark"
SETS = json.loads((GOLDEN / "expected.json").read_text()) if GOLDEN.exists() else {}
SIDE, WIDTH = 8, 24


def image_weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3 * SIDE * SIDE, WIDTH)).astype(np.float32)


def text_row(text: str) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    return rng.standard_normal(WIDTH).astype(np.float32)


class Toy:
    """Pixels times fixed numbers, and fixed numbers for each text."""

    name, fingerprint, loss, logit_scale, logit_bias = "toy", "toy", "softmax", 10.0, 0.0

    def __init__(self, decode: str):
        values = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "decode": decode}
        self.preprocess = Preprocess(PreprocessConfig(image_size=SIDE, resize="crop", **values))

    def encode_image(self, images):
        rows = self.preprocess(images)
        return unit(np.moveaxis(rows, -1, 1).reshape(len(rows), -1) @ image_weights())

    def encode_text(self, texts):
        return unit(np.stack([text_row(text) for text in texts]))


def unit(z: np.ndarray) -> np.ndarray:
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def measured(name: str, decode: str) -> dict[str, float]:
    task = open_task(f"wds:{GOLDEN / name}")
    assert not isinstance(task, Missing), task.why
    return clip_benchmark_fields(measure(Toy(decode), task))["metrics"]


@pytest.mark.parametrize("name", SETS)
def test_figures_are_clip_benchmarks(name):
    found = measured(name, "reference")
    for metric, value in SETS[name].items():
        assert found[metric] == pytest.approx(value, abs=1e-6), metric


def test_the_rule_for_image_files_shows_in_the_figures():
    """Half of the images are turned, transparent, of a palette, CMYK or of 16 bits."""
    assert SETS
    assert any(measured(name, "intended") != measured(name, "reference") for name in SETS)
