"""Export to transformers' VisionTextDualEncoderModel."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm.config import ModelConfig, NoTextConfig, TextConfig, ViTConfig
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import writing_parts as parts
from vlm.weights.rules import write
from vlm.weights.text_encoders import first_position
from vlm.weights.vision_text import model_config, rules
from vlm.weights.writing_one_tower import one_tower_config

_POSITIONS = "text_model.embeddings.position_embeddings.weight"
_SEGMENTS = 2  # rows of the table of segments, which is zero: our positions include it


def is_vision_text(config: ModelConfig) -> bool:
    """Whether a model is of a ViT and a BERT with its pooler, or of another ViT and CLIP's text."""
    vision, text = config.vision, config.text
    if not isinstance(vision, ViTConfig) or not isinstance(text, TextConfig):
        return False
    clip = text.causal and not vision.pre_norm and vision.patch_bias
    return vision.projection == text.projection == "linear" and (text.pooler or clip)


def vision_text_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists all fields that the class does not support.
    """
    vision, text = config.vision, config.text_transformer
    assert isinstance(vision, ViTConfig)
    alone = dataclasses.replace(vision, projection="none")
    image = one_tower_config(ModelConfig(alone, NoTextConfig(), embed_dim=vision.width))
    bert = text.norm == "post"
    wanted: dict[str, Any] = {"positions": "learned", "scale_embedding": False}
    wanted |= {"layer_scale": False, "last_norm": False}
    if bert:
        wanted |= {"causal": False, "pool": "first"}
    parts.check(
        "transformers",
        config,
        {},
        wanted,
        {
            "a logit_bias": config.init_bias is not None,
            "a text tower that sees padding": bert and text.pad_id not in (0, 1),
            "a ViT without a pooler": image["model_type"] == "vit" and not vision.pooler,
            f"text.pool {text.pool!r}": not bert and text.pool not in ("end", "argmax"),
        },
    )
    rule = tokenizer.config
    ends: dict[str, Any] = {"bos_token_id": rule.bos_id, "eos_token_id": rule.eos_id}
    if bert:
        kind = "roberta" if text.pad_id else "bert"
        length = text.context_length + first_position(text)
        more = {"max_position_embeddings": length, "type_vocab_size": _SEGMENTS, **ends}
    else:
        kind = "clip_text_model"
        ends["eos_token_id"] = 2 if text.pool == "argmax" else text.end_id
        more = {"pad_token_id": rule.pad_id, **ends}
    values = parts.model_values(
        "vision-text-dual-encoder",
        "VisionTextDualEncoderModel",
        projection_dim=config.embed_dim,
        vision_config=image,
        text_config=parts.text_values(text, "") | {"model_type": kind} | more,
    )
    parts.refuse_differences("transformers", config, model_config(values, "config.json"))
    return values


def vision_text_tensors(model: DualEncoder, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield all tensors of the class, for a vision tower of the type `kind`."""
    config = model.config
    text = config.text_transformer
    first = first_position(text)
    for name, tensor in write(model, rules(config, kind, {})):
        if name == _POSITIONS:
            unused = np.zeros((first, text.width), np.float32)
            yield name, np.concatenate([unused, np.asarray(tensor)])
            segments = np.zeros((_SEGMENTS, text.width), np.float32)
            yield name.replace("position", "token_type"), segments
        else:
            yield name, tensor
