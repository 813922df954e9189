"""Heat maps as pictures."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

# From little to much: dark violet over red to pale yellow, whose lightness rises all the way, so
# that it reads without colour vision and in grey print. Red, green and blue at equal steps.
_SCALE = np.array(
    [(20, 14, 54), (84, 15, 109), (158, 40, 100), (219, 80, 59), (249, 142, 8), (252, 255, 164)],
    np.float32,
)


def colours(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Values from 0 to 1 as colours, from dark to bright."""
    at = np.clip(values, 0, 1) * (len(_SCALE) - 1)
    low = np.minimum(at.astype(int), len(_SCALE) - 2)
    part = (at - low)[..., None]
    return (_SCALE[low] * (1 - part) + _SCALE[low + 1] * part + 0.5).astype(np.uint8)


def overlay(image: Image.Image, heat: Float[np.ndarray, "h w"]) -> Image.Image:
    """The image in pale grey under the colours of its heat; the eye sees small heat by its root."""
    grey = 255 * 0.4 + 0.6 * np.asarray(image.convert("L"), np.float32)[..., None]
    seen = np.sqrt(np.clip(heat, 0, 1))
    strength = 0.85 * seen[..., None]
    mixed = grey * (1 - strength) + colours(0.25 + 0.75 * seen) * strength
    return Image.fromarray(mixed.astype(np.uint8))
