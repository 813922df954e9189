"""`Bundle.with_text` and `Bundle.with_dimensions`: joined towers and truncated embeddings.

Some models come as two checkpoints, one for each tower, that were trained in one space, such as
nomic-embed-vision-v1.5 and nomic-embed-text-v1.5. Truncation is Matryoshka representation learning
(Kusupati et al., 2022, arXiv:2205.13147).
"""

import dataclasses
from typing import Any, TypeVar, cast

import jax.numpy as jnp
from flax import nnx

from vlm.config import ModelConfig, XCLIPConfig
from vlm.errors import ConfigError, warn_once
from vlm.models.dual_encoder import DualEncoder
from vlm.weights.instantiate import abstract_model, check_tower

B = TypeVar("B")  # Bundle, which imports this module


def with_text(self: B, text: B) -> B:
    """Join the vision tower of this bundle and the text tower of the bundle `text`.

    Both must be trained in one space, which vlm cannot check. The new bundle has the preprocessing,
    logit scale and loss of this one, and the tokenizer and prompts of `text`. Adapters are merged,
    and arrays are shared. `save` writes it as any bundle.

    Raises:
        ConfigError: one has no such tower, their embeddings differ in size, or the vision tower is
            X-CLIP's.

    Example:
        >>> joined = model.with_text(model)
        >>> joined.encode_text("a red square").shape
        (1, 16)
    """
    first, second = cast(Any, self), cast(Any, text)
    check_tower(first.model, "vision", first.name)
    check_tower(second.model, "text", second.name)
    _check_no_video_prompts(first, "joined with another text tower")
    ours, theirs = first.config, second.config
    if (ours.embed_dim, ours.full_dim) != (theirs.embed_dim, theirs.full_dim):
        raise ConfigError(
            f"{first.name} embeds images in {_size(ours)} dimensions and {second.name} texts in "
            f"{_size(theirs)}: join towers that were trained in one space"
        )
    sizes = tuple(size for size in ours.matryoshka if size in theirs.matryoshka)
    config = dataclasses.replace(ours, text=theirs.text, matryoshka=sizes)
    images, texts = _copy(first.merged().model, ours), _copy(second.merged().model, theirs)
    model = abstract_model(config, jnp.float32)  # whose parts are all replaced
    model.vision, model.text = images.vision, texts.text
    model.logit_scale, model.logit_bias = images.logit_scale, images.logit_bias
    name = f"{first.name} with {second.name}"
    return type(first)(model, first.preprocess, second.tokenizer, name, templates=first.templates)


def with_dimensions(self: B, dimensions: int) -> B:
    """Copy the bundle with embeddings truncated to their first `dimensions`, of unit norm again.

    This is for models that were trained for it (Matryoshka). A warning is logged if the model's
    files do not list the size. An adapter is merged. `save` keeps the truncation.

    Raises:
        ConfigError: more dimensions than the model has, or none; or X-CLIP.

    Example:
        >>> model.with_dimensions(8).encode_text("a red square").shape
        (1, 8)
    """
    bundle = cast(Any, self)
    _check_no_video_prompts(bundle, "truncated")
    config, full = bundle.config, bundle.config.tower_dim
    if not 1 <= dimensions <= full:
        raise ConfigError(
            f"dimensions {dimensions}: {bundle.name} has {full}, so choose 1 to {full}"
        )
    if dimensions not in (full, *config.matryoshka):
        sizes = ", ".join(map(str, config.matryoshka)) or "no size"
        warn_once(
            f"{bundle.name}: embeddings are truncated to {dimensions} dimensions, and its files "
            f"list {sizes} that it was trained for: other models lose accuracy by truncation"
        )
    config = dataclasses.replace(
        config, embed_dim=dimensions, full_dim=None if dimensions == full else full
    )
    return bundle._like(_copy(bundle.merged().model, config))


def _check_no_video_prompts(bundle: Any, change: str) -> None:
    if isinstance(bundle.config.vision, XCLIPConfig):
        raise ConfigError(
            f"{bundle.name} cannot be {change}: its vision tower (X-CLIP) changes the full text "
            "embeddings of its own text tower by each video, so use another model"
        )


def _copy(model: DualEncoder, config: ModelConfig) -> DualEncoder:
    """Copy a model with another config of the same towers; arrays are shared."""
    other = nnx.merge(*nnx.split(model))
    other.config = config
    return other


def _size(config: ModelConfig) -> str:
    return f"{config.embed_dim}" + (f" of {config.full_dim}" if config.full_dim else "")
