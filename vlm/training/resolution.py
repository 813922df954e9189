"""Resolution schedule: train on small images first.

The data do not change: images shrink on the device, so a resumed run reads the same pixels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm.config import Experiment

Params = dict[str, Any]


def image_size_at(experiment: Experiment, step: int, total: int) -> int:
    """Return the image size, in pixels, of the step that follows `step` steps of `total`."""
    end = 0.0
    for share, size in experiment.resolution_schedule:
        end += share
        if step < round(end * total):
            return size
    return experiment.model.vision.image_size


def shrink(images: Float[Array, "b h w 3"], size: int) -> Float[Array, "b s s 3"]:
    """Resize images to `size` pixels, by antialiased bilinear resampling."""
    b, _, _, c = images.shape
    return jax.image.resize(images, (b, size, size, c), "bilinear")


def with_grid(vision: Params, grid: int) -> Params:
    """Resample a vision tower's position embeddings to `grid` x `grid` patches.

    Bicubic, as in open_clip and SigLIP; positions before the grid, such as that of the class token,
    do not change. Gradients flow back to the embeddings of the full grid.
    """
    position = vision["position"]
    first = len(position) - int(len(position) ** 0.5) ** 2
    return {**vision, "position": resampled(position, first + grid**2)}


def resampled(
    table: Float[Array, "n d"], rows: int, method: str = "bicubic"
) -> Float[Array, "rows d"]:
    """Resample a table of position embeddings to another number of rows.

    Rows before the square grid do not change.
    """
    full, grid = int(len(table) ** 0.5), int(rows**0.5)
    first = len(table) - full**2
    grids = table[first:].reshape(full, full, -1)
    grids = jax.image.resize(grids, (grid, grid, grids.shape[-1]), method)
    return jnp.concatenate([table[:first], grids.reshape(grid**2, -1)])
