"""NaFlex: images of any aspect ratio as sequences of patches within a budget (SigLIP 2)."""

import functools
import math

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import DTypeLike

from vlm.inputs.resizing import resize_matrix
from vlm.nn.naflex import Patches

STEP = 64  # patches; sequences are padded to a multiple, to limit the shapes to compile


def target_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Compute the largest (height, width) within the budget; both divide by the patch size.

    The bisection repeats the reference code (Hugging Face's `Siglip2ImageProcessor`) step by step,
    since the size depends on where it stops.
    """

    def scaled(scale: float, size: int) -> int:
        return max(patch_size, math.ceil(size * scale / patch_size) * patch_size)

    low, high, eps = 1e-6, 100.0, 1e-5
    while high - low >= eps:
        scale = (low + high) / 2
        count = (scaled(scale, height) / patch_size) * (scaled(scale, width) / patch_size)
        low, high = (scale, high) if count <= max_patches else (low, scale)
    return scaled(low, height), scaled(low, width)


def collate(images: list[np.ndarray], patch_size: int, grid: int, step: int) -> Patches:
    """Batch resized images (h, w, 3); the sequence length is a multiple of `step` patches."""
    longest = max(image.shape[0] * image.shape[1] // patch_size**2 for image in images)
    length, dtype = -(-longest // step) * step, images[0].dtype
    batch = blank(len(images), length, patch_size, grid, dtype)
    for row, image in enumerate(images):
        put(batch, row, image)
    return batch


def blank(
    count: int, length: int, patch_size: int, grid: int, dtype: DTypeLike = np.uint8
) -> Patches:
    """Make a batch of `count` images of one black patch each (attention needs at least one)."""
    mask = np.zeros((count, length), bool)
    mask[:, 0] = True
    # NumPy arrays until they are put on a device.
    return Patches(
        np.zeros((count, length, patch_size**2, 3), dtype),  # pyright: ignore[reportArgumentType]
        np.zeros((count, length, grid), np.float32),  # pyright: ignore[reportArgumentType]
        np.zeros((count, length, grid), np.float32),  # pyright: ignore[reportArgumentType]
        mask,  # pyright: ignore[reportArgumentType]
    )


def put(batch: Patches, row: int, image: Shaped[np.ndarray, "h w 3"]) -> None:
    """Write a resized image into `row` of a batch of NumPy arrays."""
    pixels, rows, columns, mask = (np.asarray(array)[row] for array in batch)  # views
    side, grid = math.isqrt(pixels.shape[1]), rows.shape[1]
    h, w = image.shape[0] // side, image.shape[1] // side
    count = h * w
    cut = image.reshape(h, side, w, side, 3).transpose(0, 2, 1, 3, 4)
    pixels[:count], pixels[count:] = cut.reshape(count, side**2, 3), 0
    rows[:count], rows[count:] = np.repeat(_weights(grid, h), w, axis=0), 0
    columns[:count], columns[count:] = np.tile(_weights(grid, w), (h, 1)), 0
    mask[:] = np.arange(len(mask)) < count


@functools.lru_cache(256)
def _weights(grid: int, count: int) -> Float[np.ndarray, "count grid"]:
    """Interpolation weights of `count` patches along a side over the grid positions."""
    return resize_matrix(grid, count, "bilinear", antialias=True)
