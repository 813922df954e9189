"""What a folder of transformers' `ChineseCLIPModel` or `AltCLIPModel` says of a model of ours."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm.config import ModelConfig, TextConfig, ViTConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import bert_clip, huggingface
from vlm.weights.rules import write
from vlm.weights.writing_parts import check, refuse

_CLASSES = {"chinese_clip": "ChineseCLIPModel", "altclip": "AltCLIPModel"}
_SEGMENTS = {"chinese_clip": 2, "altclip": 1}
_POSITIONS = "embeddings.position_embeddings.weight"


def is_bert_clip(config: ModelConfig) -> bool:
    """Whether a model's towers are a ViT with a class token and a text tower of BERT's kind."""
    vision = config.vision
    return isinstance(vision, ViTConfig) and vision.pool == "class" and config.text.norm == "post"


def bert_clip_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
        CheckpointError: lists all that the class does not have.
    """
    vision, text, family = config.vision, config.text, _family(config.text)
    assert isinstance(vision, ViTConfig)
    form = f"transformers' {_CLASSES[family]}"
    check(
        form,
        config,
        {"stem": "linear", "rotary": None, "max_patches": None, "mlp": "plain"}
        | {"layer_scale": False, "pre_norm": True, "patch_bias": False, "projection": "linear"},
        {"causal": False, "pool": "first", "positions": "learned", "scale_embedding": False}
        | {"layer_scale": False}
        | {"projection": "linear_bias" if family == "altclip" else "linear"},
    )
    if text.pad_id is None:
        refuse(form, ["a text tower that sees padding"])
    if config.init_bias is not None:
        refuse(form, ["a logit_bias"])
    more = {"project_dim": config.embed_dim} if family == "altclip" else {}
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "vision_config": huggingface.tower_values(vision)
        | {
            "model_type": f"{family}_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": huggingface.tower_values(text)
        | {
            "model_type": f"{family}_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length + _unused_positions(text),
            "type_vocab_size": _SEGMENTS[family],
            "pad_token_id": text.pad_id,
            **more,
        },
    }


def bert_clip_tensors(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """All that the class looks for, so that it is the same model there and on its return.

    The segment of texts is in their positions already. Of AltCLIP's two layers after its tower the
    first is all of ours, and the second changes nothing.
    """
    text, embed_dim = model.config.text, model.config.embed_dim
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
    """Those in front: RoBERTa counts from the one after the padding's id."""
    return text.pad_id + 1 if text.last_norm and text.pad_id is not None else 0
