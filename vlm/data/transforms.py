"""Basic augmentations (crop, flip, colour) as pure functions of given random numbers."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from vlm.config import AugmentConfig
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.resizing import PILLOW_KERNELS

_ATTEMPTS = 10  # to draw a crop inside the image, as in torchvision
DRAWS = 2 * _ATTEMPTS + 2 + 1 + 4  # uniform numbers per image: crop, flip, colours
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's mode L
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Augment:
    """Augmentation by `config`, followed by the resize of `preprocess`."""

    config: AugmentConfig
    preprocess: Preprocess

    def __call__(
        self,
        image: Image.Image,
        u: Float[np.ndarray, " draws"],
        size: tuple[int, int] | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Augment `image` (mode RGB) by `DRAWS` uniform numbers; return its pixels.

        `size` is the width and height of the full image, if it was decoded at a fraction of them.
        """
        draws: list[float] = u.tolist()
        if self.config.crop is None:
            pixels = self.preprocess.pixels(image)
        else:
            box = self._crop(*(size or image.size), draws)
            target = self._target_size(box)
            if size is not None and image.size != size:
                fraction = round(size[0] / image.width)  # an integer, so pixels keep their position
                edges = (*image.size, *image.size)
                left, top, right, bottom = (
                    min(x / fraction, e) for x, e in zip(box, edges, strict=True)
                )
                box = (left, top, right, bottom)
            # One resampling crops and resizes.
            kernel = PILLOW_KERNELS[self.preprocess.config.kernel]
            pixels = np.asarray(image.resize(target, kernel, box=box))
        draws = draws[2 * _ATTEMPTS + 2 :]
        if self.config.flip and draws[0] < 0.5:
            pixels = pixels[:, ::-1]
        if not (self.config.jitter or self.config.hue):
            return pixels
        values = pixels.reshape(-1, 3).astype(np.float32)
        mean = np.ones(len(values), np.float32) @ values / np.float32(len(values))
        matrix, offset = color_map(self.config, draws[1:5], mean)
        values = values @ matrix.T
        values += offset + np.float32(0.5)  # the cast below truncates, so this rounds
        np.clip(values, 0, 255, out=values)
        return values.astype(np.uint8).reshape(pixels.shape)

    def smallest(self, width: int, height: int, u: Float[np.ndarray, " draws"]) -> tuple[int, int]:
        """Return the smallest size to decode at, so that the crop is not upsampled."""
        if self.config.crop is None or not self.config.draft:
            return width, height
        box = self._crop(width, height, u.tolist())
        left, top, right, bottom = box
        across, down = self._target_size(box)
        spare = min((right - left) / across, (bottom - top) / down)
        fraction = next((n for n in (8, 4, 2) if spare >= n), 1)
        return width // fraction, height // fraction

    def _crop(self, width: int, height: int, draws: list[float]) -> Box:
        unit = width / height if self.preprocess.config.resize == "naflex" else 1.0
        return crop_box(width, height, self.config, draws[: 2 * _ATTEMPTS + 2], unit)

    def _target_size(self, box: Box) -> tuple[int, int]:
        """Return (width, height) of a resized crop: a square, or with NaFlex the crop's aspect."""
        config, (left, top, right, bottom) = self.preprocess.config, box
        if config.resize != "naflex":
            return config.image_size, config.image_size
        sides = (max(1, round(right - left)), max(1, round(bottom - top)))
        (width, height), _ = self.preprocess.layout(*sides)
        return width, height


def crop_box(
    width: int, height: int, config: AugmentConfig, u: list[float], unit: float = 1.0
) -> Box:
    """Draw a random box (left, top, right, bottom) with area fraction and aspect ratio in range.

    Inception's random resized crop (Szegedy et al., 2015) as in torchvision, with non-integer
    borders. The range of aspect ratios is in multiples of `unit`.
    """
    assert config.crop is not None
    narrowest, widest = (a * unit for a in config.aspect)
    low, high = math.log(narrowest), math.log(widest)
    for k in range(_ATTEMPTS):
        area = width * height * (config.crop[0] + u[2 * k] * (config.crop[1] - config.crop[0]))
        aspect = math.exp(low + u[2 * k + 1] * (high - low))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = u[-2] * (width - w), u[-1] * (height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, narrowest), widest)
    w, h = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def color_map(
    config: AugmentConfig, u: list[float], mean: Float32[np.ndarray, "3"]
) -> tuple[Float32[np.ndarray, "3 3"], Float32[np.ndarray, "3"]]:
    """Combine brightness, contrast, saturation and hue into one affine map of colours.

    Contrast scales around the grey of the image's `mean` colour. Hue rotates around the grey axis
    (in YIQ), which preserves luma, so the order of the four does not matter.
    """
    brightness, contrast, saturation = (1 + config.jitter * (2 * x - 1) for x in u[:3])
    angle = 2 * math.pi * config.hue * (2 * u[3] - 1)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array(
        [
            [1, 0, 0],
            [0, saturation * cos, -saturation * sin],
            [0, saturation * sin, saturation * cos],
        ]
    )
    matrix = (brightness * contrast) * (_RGB @ turn @ _YIQ)
    grey = brightness * (1 - contrast) * float(_LUMA @ mean)
    return matrix.astype(np.float32), np.full(3, grey, np.float32)
