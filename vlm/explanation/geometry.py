"""Mapping from the grid positions of a tower to the pixels of the original image."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm.config import GroupViTConfig, VisionModuleConfig, VisionTowerConfig
from vlm.errors import ConfigError
from vlm.inputs.naflex import target_size
from vlm.inputs.preprocess import Preprocess


def grid(
    tower: VisionTowerConfig, preprocess: Preprocess, size: tuple[int, int]
) -> tuple[int, int]:
    """Return the rows and columns of the tower's grid for an image of `size`, (width, height)."""
    c, patch = preprocess.config, tower.patch_size
    if c.resize == "naflex":
        assert c.patch_size is not None  # `Preprocess` checks that both are set
        assert c.max_patches is not None
        height, width = target_size(size[1], size[0], c.patch_size, c.max_patches)
        return height // patch, width // patch
    count = tower.tokens() - getattr(tower, "prefix_tokens", 0)
    side = int(count**0.5)  # rounds off the additional mean token of a ResNet
    return side, side


def check_positions(tower: VisionTowerConfig, what: str) -> None:
    """Raise a ConfigError unless the layout of the tower's positions is known."""
    if isinstance(tower, VisionModuleConfig):
        raise ConfigError(
            f"{what} needs the positions of the vision tower, and {tower.module} is a module of "
            "your own, whose layout vlm does not have: use a model with a tower of vlm"
        )
    if isinstance(tower, GroupViTConfig):
        raise ConfigError(
            f"{what} needs a vector for each position of the vision tower, and a GroupViT merges "
            "its patches into segments: use a model with another tower"
        )


def on_image(
    values: Float[np.ndarray, "p q"],
    preprocess: Preprocess,
    patch_size: int,
    size: tuple[int, int],
    outside: float = 0.0,
) -> Float[np.ndarray, "h w"]:
    """Upsample a map over grid positions to the pixels of an image of `size`, (width, height).

    Values are interpolated between the centres of the positions. Pixels that the model does not
    see, outside the crop or the last full patch, get the value `outside`.
    """
    config, (width, height) = preprocess.config, size
    (resized_width, resized_height), box = preprocess.layout(width, height)
    shape = (config.image_size, config.image_size)
    shape = (resized_height, resized_width) if config.resize == "naflex" else shape
    pixels = on_pixels(values, patch_size, shape, outside)
    if config.resize == "pad" and box is not None:
        left, top, right, bottom = box
        return _resize(pixels[top:bottom, left:right], size)
    if box is None:
        return _resize(pixels, size)
    # A crop: its edges in pixels of the original image.
    x_scale, y_scale = width / resized_width, height / resized_height
    left, right = (min(width, max(0, round(x * x_scale))) for x in (box[0], box[2]))
    top, bottom = (min(height, max(0, round(y * y_scale))) for y in (box[1], box[3]))
    result = np.full((height, width), outside, np.float32)
    if right > left and bottom > top:
        result[top:bottom, left:right] = _resize(pixels, (right - left, bottom - top))
    return result


def on_pixels(
    values: Float[np.ndarray, "p q"],
    patch_size: int,
    shape: tuple[int, int],
    outside: float = 0.0,
) -> Float[np.ndarray, "h w"]:
    """Upsample a map over grid positions to the `shape` of the model's input.

    A strip at the right and lower edges that fills no patch gets the value `outside`.
    """
    rows, columns = values.shape
    upsampled = _resize(values, (columns * patch_size, rows * patch_size))[: shape[0], : shape[1]]
    result = np.full(shape, outside, np.float32)
    result[: upsampled.shape[0], : upsampled.shape[1]] = upsampled
    return result


def _resize(values: Float[np.ndarray, "p q"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Resize a map bilinearly to `size`, (width, height)."""
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))
