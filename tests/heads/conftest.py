"""A small dual encoder with real arithmetic: heads depend only on embeddings."""

import re
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm.errors import DataError

COLOURS = {
    "black": (10, 10, 10), "white": (245, 245, 245), "red": (220, 30, 30),
    "green": (30, 180, 60), "blue": (40, 70, 220), "yellow": (240, 220, 40),
}  # fmt: skip


class ColourModel:
    """Encodes the mean colour of an image, and colour words; other words are hashed noise."""

    loss, logit_scale, logit_bias, name = "softmax", 50.0, 0.0, "colours"

    def __init__(self, embed_dim=16, seed=0):
        rng = np.random.default_rng(seed)
        self.projection = rng.standard_normal((3, embed_dim)).astype(np.float32)
        self.seen = 0

    def encode_image(self, images, batch_size=32, on_error=None):
        single = isinstance(images, Image.Image) or getattr(images, "ndim", 4) == 3
        features = []
        for number, image in enumerate([images] if single else images):
            if not isinstance(image, np.ndarray | Image.Image):
                try:
                    image = Image.open(image)
                except OSError as error:
                    if on_error is None:
                        raise
                    on_error(number, DataError(str(error)))
                    continue
            self.seen += 1
            features.append(np.asarray(image, np.float32).mean((0, 1))[:3])
        return self._unit(np.array(features).reshape(-1, 3) / 127.5 - 1)

    def encode_text(self, texts):
        assert isinstance(texts, list)
        features = np.zeros((len(texts), 3), np.float32)
        for row, text in zip(features, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                if word in COLOURS:
                    row += np.array(COLOURS[word]) / 127.5 - 1
                else:
                    noise = np.random.default_rng(zlib.crc32(word.encode()))
                    row += 0.02 * noise.standard_normal(3)
        return self._unit(features)

    def _unit(self, features):
        z = features.astype(np.float32) @ self.projection
        return z / np.linalg.norm(z, axis=1, keepdims=True)


def picture(colour, size=(12, 8), noise=0.0, seed=0):
    """A PIL image of one colour, with noise on its pixels."""
    rng = np.random.default_rng(seed)
    pixels = np.array(COLOURS[colour]) + noise * rng.standard_normal((size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def model():
    return ColourModel()


@pytest.fixture
def make_model():
    return ColourModel


@pytest.fixture
def paint():
    return picture
