"""Folders of transformers with one tower: images alone, or CLIP's texts alone.

Such a model has no scale of logits: it gets the initial one of CLIP, which changes no embedding.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import models

from vlm.config import (
    ModelConfig,
    NoTextConfig,
    NoVisionConfig,
    PreprocessConfig,
    TokenizerConfig,
    VisionTowerConfig,
    ViTConfig,
)
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weights
from vlm.weights.fields import integer
from vlm.weights.files import Tensors
from vlm.weights.layers import linear
from vlm.weights.resolution import Positions
from vlm.weights.rules import SCALAR, Rule
from vlm.weights.vision_towers import (
    ANY_SIZE,
    DEFAULTS,
    POSITIONS,
    is_unused,
    vision_config,
    vision_rules,
    without_biases,
)

_TEXT = "clip_text_model"
MODEL_TYPES = (*DEFAULTS, _TEXT)
SCALE = Rule("logit_scale", "logit_scale", SCALAR)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model, as far as its config.json describes it."""
    kind = values["model_type"]
    projected = any("WithProjection" in str(name) for name in values.get("architectures") or ())
    embed_dim = values.get("projection_dim") or 512
    if kind == _TEXT:
        given = huggingface.fields_of_tower(values, huggingface.DEFAULTS["clip"]["text"], where)
        text = huggingface.clip_text(given, "clip", where)
        text = text if projected else dataclasses.replace(text, projection="none")
        width = integer(embed_dim, f"{where}: projection_dim") if projected else text.width
        return ModelConfig(NoVisionConfig(), text, embed_dim=width)
    vision = vision_config(values, kind, where)
    if kind == "clip_vision_model" and projected:
        vision = dataclasses.replace(vision, projection="linear")
        return ModelConfig(
            vision, NoTextConfig(), embed_dim=integer(embed_dim, f"{where}: projection_dim")
        )
    return ModelConfig(vision, NoTextConfig(), embed_dim=vision.width)


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    kind, tensors = values["model_type"], weights(folder, *huggingface.WEIGHTS)
    if kind == _TEXT:
        return _open_text(folder, config, tensors)
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    root = next((name for name in tensors.shapes if name.endswith("pooler.dense.weight")), None)
    if kind == "vit" and root is not None:
        vision = dataclasses.replace(vision, pooler=True)
    rules = vision_rules(kind, vision, tensors.shapes)
    tensors = without_biases(tensors, rules, DEFAULTS[kind] | values)
    if vision.projection == "linear":
        rules = [*rules, *linear("visual_projection", "vision.projection", bias=False)]
    preprocess = huggingface.preprocess_config(folder, vision.image_size)
    same = preprocess.image_size == vision.image_size
    return vision_checkpoint(
        folder.name,
        vision,
        config.embed_dim,
        preprocess,
        tensors,
        rules,
        positions=POSITIONS.get(kind, "bicubic"),
        image_size=preprocess.image_size if kind in ANY_SIZE and not same else None,
    )


def vision_checkpoint(
    name: str,
    vision: VisionTowerConfig,
    embed_dim: int,
    preprocess: PreprocessConfig,
    tensors: Tensors,
    rules: list[Rule],
    *,
    positions: Positions = "bicubic",
    image_size: int | None = None,
) -> Checkpoint:
    """Describe a vision tower that is a model of its own."""
    config = ModelConfig(vision, NoTextConfig(), embed_dim=embed_dim)
    return Checkpoint(
        name,
        config,
        preprocess,
        no_tokenizer(),
        with_scale(tensors, config),
        [SCALE, *rules],
        is_unused,
        positions,
        image_size=image_size,
    )


def text_checkpoint(
    name: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Tensors,
    rules: list[Rule],
    ignored: Callable[[str], bool],
    *,
    context_length: int | None = None,
) -> Checkpoint:
    """Describe a text tower that is a model of its own."""
    return Checkpoint(
        name,
        config,
        PreprocessConfig(image_size=config.vision.image_size),
        tokenizer,
        with_scale(tensors, config),
        [SCALE, *rules],
        ignored,
        "bicubic",
        context_length=context_length,
    )


def no_tokenizer() -> Tokenizer:
    """Return the tokenizer of a model without a text tower: it has the padding alone."""
    empty = tokenizers.Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return Tokenizer(empty, TokenizerConfig(context_length=1, bos_id=None, eos_id=None))


def _open_text(folder: epath.Path, config: ModelConfig, tensors: Tensors) -> Checkpoint:
    start = "text_model."
    inside = any(name.startswith(start) for name in tensors.shapes)
    rules = [
        rule if inside else dataclasses.replace(rule, theirs=rule.theirs.removeprefix(start))
        for rule in huggingface.CLIP_RULES
        if str(rule.ours).startswith("text.")
        and (config.text_transformer.projection == "linear" or rule.theirs.startswith(start))
    ]
    return huggingface.assemble(
        folder,
        config,
        [SCALE, *rules],
        tensors=with_scale(tensors, config),
        preprocess=PreprocessConfig(image_size=config.vision.image_size),
        ignored=lambda name: bool(re.search(r"(^|\.)position_ids$", name)),
    )


def with_scale(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Add the initial scale of the logits to tensors without one."""
    scale = np.asarray(np.log(config.init_scale), np.float32)
    return ComputedTensors(tensors, {"logit_scale": ((), lambda start, stop: scale)})
