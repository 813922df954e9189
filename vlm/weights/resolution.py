"""Another image size for a loaded model: position embeddings resized as its family's code does."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from vlm.config import ModelConfig, PreprocessConfig
from vlm.errors import ConfigError
from vlm.models.dual_encoder import DualEncoder
from vlm.preprocess import resize_matrix
from vlm.weights.building import abstract_model

# transformers: bicubic without antialias; open_clip and timm: with; big_vision: scipy's linear
# zoom, which keeps the corners in place.
Positions = Literal["bicubic", "bicubic_antialias", "zoom"]


def resized(
    model: DualEncoder,
    preprocess: PreprocessConfig,
    image_size: int,
    positions: Positions,
    *,
    dtype: jnp.dtype,
) -> tuple[DualEncoder, PreprocessConfig]:
    """The model and its preprocessing at `image_size` pixels.

    Raises:
        ConfigError: the patches do not tile that size, or the tower is of one size alone.
    """
    config, vision = model.config, model.config.vision
    if image_size == preprocess.image_size and not vision.max_patches:
        return model, preprocess
    if vision.resnet:
        raise ConfigError(
            f"image_size {image_size}: a ResNet tower takes {vision.image_size} pixels alone"
        )
    if image_size < vision.patch_size or image_size % vision.patch_size:
        lower = max(image_size // vision.patch_size, 1) * vision.patch_size
        raise ConfigError(
            f"image_size {image_size} is not tiled by patches of {vision.patch_size} pixels: "
            f"choose {lower} or {lower + vision.patch_size}"
        )
    grid, old = image_size // vision.patch_size, vision.image_size // vision.patch_size
    if vision.max_patches:  # NaFlex resizes its positions to each image anyway
        return model, dataclasses.replace(preprocess, max_patches=grid**2)
    config = dataclasses.replace(config, vision=dataclasses.replace(vision, image_size=image_size))
    position = np.asarray(model.vision.position[...], np.float32)
    moved = jnp.asarray(resize_positions(position, old, grid, positions), dtype)
    sharding = model.vision.position[...].sharding
    model = with_config(model, config, dtype=dtype)
    model.vision.position.set_value(jax.device_put(moved, sharding))
    short = preprocess.short_side
    if short is not None:
        short = round(short * image_size / preprocess.image_size)
    return model, dataclasses.replace(preprocess, image_size=image_size, short_side=short)


def resize_positions(
    position: Float[np.ndarray, "n d"], old: int, new: int, positions: Positions
) -> Float[np.ndarray, "m d"]:
    """A square grid of position embeddings at another size; tokens before it stay as they are."""
    first, grid = position[: len(position) - old**2], position[len(position) - old**2 :]
    if positions == "zoom":
        weights = _corner_matrix(old, new)
    else:
        weights = resize_matrix(old, new, "bicubic", positions == "bicubic_antialias")
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid.reshape(old, old, -1), optimize=True)
    return np.concatenate([first, grid.reshape(new**2, -1)])


def with_config(model: DualEncoder, config: ModelConfig, *, dtype: jnp.dtype) -> DualEncoder:
    """The parameters of `model`, without a copy, under another configuration."""
    graph, _ = nnx.split(abstract_model(config, dtype))
    return nnx.merge(graph, nnx.state(model))


def _corner_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Linear interpolation at `new` points from the first of `old` to the last."""
    at = np.arange(new) * ((old - 1) / max(new - 1, 1))
    low = np.minimum(at.astype(int), old - 1)
    high = np.minimum(low + 1, old - 1)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new), low), 1 - (at - low))
    np.add.at(weights, (np.arange(new), high), at - low)
    return weights
