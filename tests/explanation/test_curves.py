"""A small version of curves.py with a tower of random weights.

The "text" embedding of an image is the image's own embedding, so the relevant positions are
well-defined without any training.
"""

import dataclasses
import pathlib

import numpy as np
import pytest
from curves import measure
from flax import nnx
from PIL import Image, ImageDraw

import vlm
from vlm.config import PreprocessConfig, ViTConfig
from vlm.evaluation.intervals import mean
from vlm.inputs.preprocess import Preprocess
from vlm.models.dual_encoder import DualEncoder

GOLDEN = pathlib.Path(__file__).parent.parent / "weights" / "golden"
TOWER = ViTConfig(
    image_size=32,
    patch_size=8,
    width=32,
    depth=2,
    heads=2,
    mlp_dim=64,
    pool="class",
    projection="linear",
)


class ImagesAsTexts(vlm.Bundle):
    """Model whose texts are names of images, with the embeddings of those images."""

    pictures: dict

    def encode_text(self, texts, batch_size=None):
        return self.encode_image([self.pictures[text] for text in texts])


def drawings(count):
    """Draw a random coloured square on white for each number."""
    rng = np.random.default_rng(0)
    images = {}
    for number in range(count):
        image = Image.new("RGB", (32, 32), "white")
        left, top = rng.integers(0, 20, 2)
        colour = tuple(int(c) for c in rng.integers(0, 200, 3))
        ImageDraw.Draw(image).rectangle((left, top, left + 11, top + 11), fill=colour)
        images[f"drawing {number}"] = image
    return images


@pytest.mark.slow
def test_path_is_more_faithful_than_random_maps():
    clip = vlm.load(GOLDEN / "oc_vit")
    config = dataclasses.replace(clip.config, vision=TOWER, init_scale=30.0)
    model = ImagesAsTexts(
        DualEncoder(config, rngs=nnx.Rngs(0)),
        Preprocess(PreprocessConfig(image_size=32)),
        clip.tokenizer,
        "drawings",
    )
    model.pictures = drawings(24)
    names = list(model.pictures)
    areas = measure(model, list(model.pictures.values()), names, ("path", "gradcam"))
    assert set(areas) == {"random", "path", "gradcam"}
    for gain in (
        areas["random"].deletion - areas["path"].deletion,
        areas["path"].insertion - areas["random"].insertion,
    ):
        assert mean(gain).low > 0
