"""Export to transformers' ChineseCLIP and AltCLIP."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm.config import ModelConfig, TextConfig, ViTConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import bert_clip
from vlm.weights.rules import write
from vlm.weights.writing_parts import (
    check,
    model_values,
    refuse_differences,
    text_values,
    vision_values,
)

_CLASSES = {"chinese_clip": "ChineseCLIPModel", "altclip": "AltCLIPModel"}
_SEGMENTS = {"chinese_clip": 2, "altclip": 1}
_POSITIONS = "embeddings.position_embeddings.weight"


def is_bert_clip(config: ModelConfig) -> bool:
    """Return True if the towers are a ViT with a class token and a BERT."""
    vision = config.vision
    return (
        isinstance(vision, ViTConfig)
        and vision.pool == "class"
        and config.text_transformer.norm == "post"
    )


def bert_clip_config(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists all fields that the class does not support.
    """
    vision, text, family = config.vision, config.text_transformer, _family(config.text_transformer)
    assert isinstance(vision, ViTConfig)
    check(
        f"transformers' {_CLASSES[family]}",
        config,
        {"stem": "linear", "rotary": None, "max_patches": None, "mlp": "plain"}
        | {"layer_scale": False, "pre_norm": True, "patch_bias": False, "projection": "linear"},
        {"causal": False, "pool": "first", "positions": "learned", "scale_embedding": False}
        | {"layer_scale": False, "pooler": False}
        | {"projection": "linear_bias" if family == "altclip" else "linear"},
        {
            "a text tower that sees padding": text.pad_id is None,
            "a logit_bias": config.init_bias is not None,
        },
    )
    more = {"project_dim": config.embed_dim} if family == "altclip" else {}
    values = model_values(
        family,
        _CLASSES[family],
        projection_dim=config.embed_dim,
        vision_config=vision_values(vision, family),
        text_config=text_values(
            text,
            family,
            max_position_embeddings=text.context_length + _unused_positions(text),
            type_vocab_size=_SEGMENTS[family],
            **more,
        ),
    )
    form = f"transformers' {_CLASSES[family]}"
    refuse_differences(form, config, bert_clip.model_config(values, "config.json"))
    return values


def bert_clip_tensors(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """Yield all tensors of the class, such that the embeddings are the same.

    Our positions include the token type embedding, so that of the file is zero. AltCLIP has two
    layers after its text tower: the first is our projection, the second the identity.
    """
    text, embed_dim = model.config.text_transformer, model.config.embed_dim
    family, zeros = _family(text), np.zeros
    for name, tensor in write(model, bert_clip.rules(family)):
        if name.endswith(_POSITIONS):
            unused = zeros((_unused_positions(text), text.width), np.float32)
            yield name, np.concatenate([unused, np.asarray(tensor)])
            segments = zeros((_SEGMENTS[family], text.width), np.float32)
            yield name.replace("position", "token_type"), segments
        elif family == "altclip" and name.startswith("text_projection."):
            yield name.replace("text_projection", "text_model.transformation"), tensor
        else:
            # The class reads the names of XLM-R in both towers.
            older = family == "altclip"
            yield name.replace(".encoder.layers.", ".encoder.layer.") if older else name, tensor
    if family == "altclip":
        yield "text_projection.weight", np.eye(embed_dim, dtype=np.float32)


def _family(text: TextConfig) -> str:
    return "altclip" if text.last_norm else "chinese_clip"


def _unused_positions(text: TextConfig) -> int:
    """Return the number of leading positions that RoBERTa skips: those up to its padding id."""
    return text.pad_id + 1 if text.last_norm and text.pad_id is not None else 0
