"""From the places of a tower back to the pixels of the image that it was shown."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm.config import VisionTowerConfig
from vlm.inputs.naflex import target_size
from vlm.inputs.preprocess import Preprocess


def grid(
    tower: VisionTowerConfig, preprocess: Preprocess, size: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the places that stand for an image of `size`, (width, height)."""
    c, patch = preprocess.config, tower.patch_size
    if c.resize == "naflex":
        assert c.patch_size is not None  # both are set, as `Preprocess` has checked
        assert c.max_patches is not None
        height, width = target_size(size[1], size[0], c.patch_size, c.max_patches)
        return height // patch, width // patch
    count = tower.tokens() - getattr(tower, "prefix_tokens", 0)
    side = int(count**0.5)  # a ResNet counts the mean as one more
    return side, side


def on_image(
    places: Float[np.ndarray, "p q"],
    preprocess: Preprocess,
    patch_size: int,
    size: tuple[int, int],
    outside: float = 0.0,
) -> Float[np.ndarray, "h w"]:
    """A map of places as a map of the pixels of an image of `size`, (width, height).

    It is interpolated between the middles of the places. What the model was not shown, because it
    was cropped away or fills no patch, is `outside`.
    """
    config, (width, height) = preprocess.config, size
    (resized_width, resized_height), box = preprocess.layout(width, height)
    shown = (config.image_size, config.image_size)
    shown = (resized_height, resized_width) if config.resize == "naflex" else shown
    seen = on_pixels(places, patch_size, shown, outside)
    if config.resize == "pad" and box is not None:
        left, top, right, bottom = box
        return _resized(seen[top:bottom, left:right], size)
    if box is None:
        return _resized(seen, size)
    # A crop: its edges in the image's own pixels.
    across, down = width / resized_width, height / resized_height
    left, right = (min(width, max(0, round(x * across))) for x in (box[0], box[2]))
    top, bottom = (min(height, max(0, round(y * down))) for y in (box[1], box[3]))
    whole = np.full((height, width), outside, np.float32)
    if right > left and bottom > top:
        whole[top:bottom, left:right] = _resized(seen, (right - left, bottom - top))
    return whole


def on_pixels(
    places: Float[np.ndarray, "p q"],
    patch_size: int,
    shape: tuple[int, int],
    outside: float = 0.0,
) -> Float[np.ndarray, "h w"]:
    """A map of places as one of the pixels that the model was shown, `shape` of them.

    Patches may leave a strip at the far edges, which is `outside`.
    """
    rows, columns = places.shape
    fine = _resized(places, (columns * patch_size, rows * patch_size))[: shape[0], : shape[1]]
    seen = np.full(shape, outside, np.float32)
    seen[: fine.shape[0], : fine.shape[1]] = fine
    return seen


def _resized(values: Float[np.ndarray, "p q"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """The same map at another size, (width, height); a larger one is interpolated."""
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))
