"""Rendering of heat maps as images."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

# Colour map from dark violet over red to pale yellow, as RGB at equal steps. Lightness rises
# monotonically, so it is readable in greyscale and for colour-blind readers.
_SCALE = np.array(
    [(20, 14, 54), (84, 15, 109), (158, 40, 100), (219, 80, 59), (249, 142, 8), (252, 255, 164)],
    np.float32,
)


def colours(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Map values from 0 to 1 to colours, from dark to bright."""
    at = np.clip(values, 0, 1) * (len(_SCALE) - 1)
    low = np.minimum(at.astype(int), len(_SCALE) - 2)
    fraction = (at - low)[..., None]
    return (_SCALE[low] * (1 - fraction) + _SCALE[low + 1] * fraction + 0.5).astype(np.uint8)


def overlay(image: Image.Image, heat: Float[np.ndarray, "h w"]) -> Image.Image:
    """Overlay a heat map on a greyscale image; the square root makes low values visible."""
    grey = 255 * 0.4 + 0.6 * np.asarray(image.convert("L"), np.float32)[..., None]
    visible = np.sqrt(np.clip(heat, 0, 1))
    strength = 0.85 * visible[..., None]
    mixed = grey * (1 - strength) + colours(0.25 + 0.75 * visible) * strength
    return Image.fromarray(mixed.astype(np.uint8))
