"""Change of image size or context length: position embeddings resized like in the original code."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from vlm.config import (
    EfficientNetConfig,
    ModelConfig,
    NoTextConfig,
    NoVisionConfig,
    PreprocessConfig,
    TextModuleConfig,
    VisionTowerConfig,
    ViTConfig,
)
from vlm.errors import ConfigError
from vlm.inputs.resizing import resize_matrix
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights.rules import Rule, Transform

# Interpolation of image positions. transformers: bicubic; open_clip and timm: bicubic_antialias;
# TIPS: bilinear_antialias; big_vision: zoom, scipy's linear zoom with fixed corners.
Positions = Literal["bicubic", "bicubic_antialias", "bilinear_antialias", "zoom"]
# open_clip interpolates text positions, to shorter and longer texts. Other code takes the first.
TextPositions = Literal["cut", "linear"]


def at_image_size(
    config: ModelConfig, preprocess: PreprocessConfig, image_size: int | None
) -> tuple[ModelConfig, PreprocessConfig]:
    """Return the configs of a model and its preprocessing at `image_size` pixels, if not None.

    Raises:
        ConfigError: the patches do not tile that size, or the tower has a fixed size.
    """
    vision = config.vision
    if image_size is not None and isinstance(vision, NoVisionConfig):
        raise ConfigError(f"image_size {image_size}: the model has no vision tower")
    flexible = getattr(vision, "max_patches", None) is not None
    same = image_size == preprocess.image_size == vision.image_size
    if image_size is None or (same and not flexible):
        return config, preprocess
    if vision.one_size:
        raise ConfigError(
            f"image_size {image_size}: a {vision.one_size} takes only {vision.image_size} pixels"
        )
    if image_size < vision.patch_size or image_size % vision.patch_size:
        lower = max(image_size // vision.patch_size, 1) * vision.patch_size
        raise ConfigError(
            f"image_size {image_size} is not tiled by patches of {vision.patch_size} pixels: "
            f"choose {lower} or {lower + vision.patch_size}"
        )
    if flexible:  # NaFlex resizes its positions to each image anyway
        return config, dataclasses.replace(
            preprocess, max_patches=(image_size // vision.patch_size) ** 2
        )
    config = dataclasses.replace(config, vision=_resized(vision, image_size))
    short = preprocess.short_side
    if short is not None:
        short = round(short * image_size / preprocess.image_size)
    return config, dataclasses.replace(preprocess, image_size=image_size, short_side=short)


def _resized(vision: VisionTowerConfig, image_size: int) -> VisionTowerConfig:
    # Padding of timm's tf_efficientnet_* depends on the image size. ALIGN's does not.
    if (
        isinstance(vision, EfficientNetConfig)
        and vision.head_width > 0
        and vision.norm_eps == 1e-3
        and vision == vision.tensorflow_padded()
    ):
        return dataclasses.replace(vision, image_size=image_size).tensorflow_padded()
    return dataclasses.replace(vision, image_size=image_size)


def at_context_length(
    config: ModelConfig, tokenizer: Tokenizer, context_length: int | None, positions: TextPositions
) -> tuple[ModelConfig, Tokenizer]:
    """Return a model's config and tokenizer for texts of `context_length` tokens, if not None.

    Raises:
        ConfigError: too short for a text, or longer than positions that are not interpolated.
    """
    text = config.text
    if context_length is None:
        return config, tokenizer
    if isinstance(text, NoTextConfig):
        raise ConfigError(f"context_length {context_length}: the model has no text tower")
    if context_length > text.context_length and positions == "cut":
        raise ConfigError(
            f"context_length {context_length}: the model has positions for {text.context_length} "
            "tokens, and its own code does not make more of them: choose at most "
            f"{text.context_length}"
        )
    if isinstance(text, TextModuleConfig) and context_length != text.context_length:
        raise ConfigError(
            f"context_length {context_length}: the text tower is a module of your own, which takes "
            f"{text.context_length} tokens as it was saved: choose that"
        )
    rules = dataclasses.replace(tokenizer.config, context_length=context_length)
    tokenizer = tokenizer.with_rules(rules)
    text = dataclasses.replace(text, context_length=context_length)
    return dataclasses.replace(config, text=text), tokenizer


def resizing(
    rules: Sequence[Rule],
    old: ModelConfig,
    new: ModelConfig,
    positions: Positions,
    text_positions: TextPositions,
) -> list[Rule]:
    """Return the rules of a checkpoint, with positions of config `old` resized for config `new`."""
    changes = {}  # our name: number of positions in the file, and function that resizes them
    grids = [c.vision.image_size // c.vision.patch_size for c in (old, new)]
    if grids[0] != grids[1] and isinstance(old.vision, ViTConfig):
        first = old.vision.has_class_token
        changes["vision.position"] = (
            grids[0] ** 2 + first,
            lambda x: resize_positions(x, grids[0], grids[1], positions),
        )
    lengths = [c.text.tokens() for c in (old, new)]
    if lengths[0] != lengths[1]:
        changes["text.position"] = (
            lengths[0],
            lambda x: resize_text_positions(x, lengths[1], text_positions),
        )
    return [
        dataclasses.replace(rule, transform=_then(rule.transform, *changes[rule.ours]))
        if rule.ours in changes
        else rule
        for rule in rules
    ]


def resize_positions(
    position: Float[np.ndarray, "n d"], old: int, new: int, positions: Positions
) -> Float[np.ndarray, "m d"]:
    """Resize a square grid of position embeddings; those of tokens before it do not change."""
    first, grid = position[: len(position) - old**2], position[len(position) - old**2 :]
    if positions == "zoom":
        weights = _corner_matrix(old, new)
    else:
        kernel, _, antialias = positions.partition("_")
        weights = resize_matrix(old, new, kernel, antialias == "antialias")
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid.reshape(old, old, -1), optimize=True)
    return np.concatenate([first, grid.reshape(new**2, -1)])


def resize_text_positions(
    position: Float[np.ndarray, "n d"], new: int, positions: TextPositions
) -> Float[np.ndarray, "m d"]:
    """Return the position embeddings of a text of `new` tokens."""
    if positions == "cut":
        return position[:new]
    return resize_matrix(len(position), new, "bilinear", antialias=False) @ position


def _then(
    transform: Transform, count: int, change: Callable[[np.ndarray], np.ndarray]
) -> Transform:
    """Return `transform` for a table of `count` positions, followed by `change`."""

    def read(theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return change(np.asarray(transform.read(theirs, (count, *shape[1:])), np.float32))

    return Transform(lambda shape: transform.shape((count, *shape[1:])), read, transform.write)


def _corner_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Return the matrix of linear interpolation at `new` points, with fixed end points."""
    at = np.arange(new) * ((old - 1) / max(new - 1, 1))
    columns = [np.interp(at, np.arange(old), unit) for unit in np.eye(old)]
    return np.stack(columns, axis=1).astype(np.float32)
