"""Small images first: the share of a run that trains at a lower resolution.

The data stay as they are and images shrink on the device, so a resumed run sees the same pixels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm.config import Experiment

Params = dict[str, Any]


def image_size_at(experiment: Experiment, step: int, total: int) -> int:
    """The image size, in pixels, that the step after `step` steps of `total` trains at."""
    end = 0.0
    for share, size in experiment.image_sizes:
        end += share
        if step < round(end * total):
            return size
    return experiment.model.vision.image_size


def shrink(images: Float[Array, "b h w 3"], size: int) -> Float[Array, "b s s 3"]:
    """Images at `size` pixels, by antialiased bilinear resampling."""
    b, _, _, c = images.shape
    return jax.image.resize(images, (b, size, size, c), "bilinear")


def with_grid(vision: Params, grid: int) -> Params:
    """A vision tower's parameters, its position embeddings resampled to `grid` x `grid` patches.

    Bicubic, as open_clip and SigLIP resample them; what stands in front of the grid, such as the
    class token, keeps its own. Gradients flow back to the embeddings of the full grid.
    """
    position = vision["position"]
    full = int(len(position) ** 0.5)
    first = len(position) - full**2
    table = position[first:].reshape(full, full, -1)
    table = jax.image.resize(table, (grid, grid, table.shape[-1]), "bicubic")
    table = table.reshape(grid**2, -1)
    return {**vision, "position": jnp.concatenate([position[:first], table])}
