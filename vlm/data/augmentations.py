"""Strong augmentations, applied after the crop: RandAugment, grey, blur, solarise, morphology.

RandAugment (Cubuk et al., 2020, arXiv:1909.13719) has the operations and ranges of torchvision, and
magnitudes 0 to 30. Grey, blur and solarise are as in SimCLR (arXiv:2002.05709) and BYOL
(arXiv:2006.07733). Lines are made thinner or thicker by grey-scale dilation and erosion, so that a
model of drawings does not depend on one artist's stroke width.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vlm.config import AugmentConfig
from vlm.config.data import MOST_OPERATIONS

DRAWS = 2 * MOST_OPERATIONS + 1 + 2 + 1 + 1  # RandAugment, then the others in order

_LEVELS = 30
_PROBABILITIES = ("grey", "blur", "solarise", "morphology")
_MEAN = (124, 116, 104)  # ImageNet's mean colour; fills the border after a shift or rotation


def is_on(config: AugmentConfig) -> bool:
    """Whether `config` enables any of these."""
    return bool(config.randaugment or any(getattr(config, name) for name in _PROBABILITIES))


def augment(
    pixels: UInt8[np.ndarray, "h w 3"], config: AugmentConfig, u: Float[np.ndarray, " draws"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Augment `pixels`, by `DRAWS` uniform numbers."""
    image, u = Image.fromarray(pixels), u.tolist()
    count, magnitude = config.randaugment or (0, 0)
    for k in range(count):
        operation = _OPERATIONS[int(u[2 * k] * len(_OPERATIONS))]
        image = operation(image, magnitude / _LEVELS, 1 if u[2 * k + 1] < 0.5 else -1)
    grey, blur, sigma, solarise, morphology = u[2 * MOST_OPERATIONS :]
    if morphology < config.morphology:
        thinner = morphology < config.morphology / 2
        image = image.filter(ImageFilter.MaxFilter(3) if thinner else ImageFilter.MinFilter(3))
    if grey < config.grey:
        image = image.convert("L").convert("RGB")
    if blur < config.blur:
        image = image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * sigma))
    if solarise < config.solarise:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image)


def _shift(x: float, y: float) -> Callable[[Image.Image, float, int], Image.Image]:
    def shift(image: Image.Image, m: float, sign: int) -> Image.Image:
        part = sign * m * 150 / 331
        return _affine(image, (1, 0, -x * part * image.width, 0, 1, -y * part * image.height))

    return shift


def _shear(x: float, y: float) -> Callable[[Image.Image, float, int], Image.Image]:
    def shear(image: Image.Image, m: float, sign: int) -> Image.Image:
        slope = sign * m * 0.3
        return _affine(image, (1, -x * slope, 0, -y * slope, 1, 0))

    return shear


def _rotate(image: Image.Image, m: float, sign: int) -> Image.Image:
    angle = math.radians(30) * m * sign
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=_MEAN
    )


def _enhance(kind: type) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, m, sign: kind(image).enhance(1 + sign * 0.9 * m)


_OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, m, sign: image,
    _shear(1, 0),
    _shear(0, 1),
    _shift(1, 0),
    _shift(0, 1),
    _rotate,
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Sharpness),
    lambda image, m, sign: ImageOps.posterize(image, 8 - round(4 * m)),
    lambda image, m, sign: ImageOps.solarize(image, round(255 * (1 - m)) + (m == 0)),
    lambda image, m, sign: ImageOps.autocontrast(image),
    lambda image, m, sign: ImageOps.equalize(image),
)
