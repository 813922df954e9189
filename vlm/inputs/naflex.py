"""NaFlex: images of any aspect as sequences of patches within a budget (SigLIP 2)."""

import math

import numpy as np

from vlm.inputs.resizing import resize_matrix
from vlm.nn.naflex import Patches

STEP = 64  # patches: sequences are padded to a multiple, so that few shapes are compiled


def target_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """NaFlex: height and width, multiples of the patch size, of the largest image in the budget.

    The bisection is that of the reference code (Hugging Face's `Siglip2ImageProcessor`), to the
    step: where it stops decides the size.
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
    """Resized images, (h, w, 3) each, as one batch; its length is a multiple of `step` patches."""
    shapes = [(image.shape[0] // patch_size, image.shape[1] // patch_size) for image in images]
    length = -(-max(h * w for h, w in shapes) // step) * step
    pixels = np.zeros((len(images), length, patch_size**2, 3), images[0].dtype)
    rows = np.zeros((len(images), length, grid), np.float32)
    columns = np.zeros_like(rows)
    mask = np.zeros((len(images), length), bool)
    for i, (image, (h, w)) in enumerate(zip(images, shapes, strict=True)):
        cut = image.reshape(h, patch_size, w, patch_size, 3).transpose(0, 2, 1, 3, 4)
        pixels[i, : h * w] = cut.reshape(h * w, patch_size**2, 3)
        rows[i, : h * w] = np.repeat(resize_matrix(grid, h, "bilinear", True), w, axis=0)
        columns[i, : h * w] = np.tile(resize_matrix(grid, w, "bilinear", True), (h, 1))
        mask[i, : h * w] = True
    # NumPy's until they lie on a device.
    return Patches(pixels, rows, columns, mask)  # pyright: ignore[reportArgumentType]
