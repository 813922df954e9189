"""transformers' `VisionTextDualEncoderModel`: any vision tower beside a BERT, RoBERTa or CLIP text.

The vision tower is one of `vision_towers`. The embedding of a BERT is its pooler's output. The
embedding of the only segment and the offset of RoBERTa's positions are folded into the tables.
"""

import dataclasses
from typing import Any

from etils import epath

from vlm.config import ModelConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weights
from vlm.weights.fields import choice, fields, with_defaults
from vlm.weights.layers import linear
from vlm.weights.rules import SCALAR, Rule, Shapes
from vlm.weights.text_encoders import PAD_ID, bert_positions, bert_rules, first_position
from vlm.weights.vision_towers import (
    ANY_SIZE,
    DEFAULTS,
    POSITIONS,
    is_unused,
    vision_config,
    vision_rules,
    without_biases,
)

MODEL_TYPES = ("vision-text-dual-encoder",)
_ROBERTA = huggingface.BERT | {
    "vocab_size": 50265, "layer_norm_eps": 1e-12, "pad_token_id": PAD_ID
}  # fmt: skip
# Defaults of the text towers, by model_type.
TEXTS: dict[str, dict[str, Any]] = {
    "bert": huggingface.BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA | {"vocab_size": 30522},
    "camembert": _ROBERTA | {"vocab_size": 30522},
    "clip_text_model": huggingface.DEFAULTS["clip"]["text"],
}
_MODEL = {"projection_dim": 512}


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family."""
    given, kind = _part(values, "vision", DEFAULTS, where)
    vision = vision_config(given, kind, f"{where}: vision_config")
    vision = dataclasses.replace(vision, pooler=kind == "vit", projection="linear")
    return ModelConfig(
        vision,
        _text(*_part(values, "text", TEXTS, where), f"{where}: text_config"),
        embed_dim=with_defaults(values, _MODEL, where)["projection_dim"],
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    tensors = weights(folder, *huggingface.WEIGHTS)
    vision, text = config.vision, config.text_transformer
    assert isinstance(vision, ViTConfig)
    kind = values["vision_config"]["model_type"]
    table = rules(config, kind, tensors.shapes)
    tensors = without_biases(tensors, table, DEFAULTS[kind] | values["vision_config"])
    if text.norm == "post":
        computed = bert_positions(tensors, "text_model", text, first_position(text))
        tensors = ComputedTensors(tensors, *computed)
    preprocess = huggingface.preprocess_config(folder, vision.image_size)
    checkpoint = huggingface.assemble(
        folder,
        config,
        table,
        tensors=tensors,
        preprocess=preprocess,
        ignored=is_unused,
        positions=POSITIONS.get(kind, "bicubic"),
    )
    resized = kind in ANY_SIZE and preprocess.image_size != vision.image_size
    image_size = preprocess.image_size if resized else None
    return dataclasses.replace(checkpoint, image_size=image_size)


def rules(config: ModelConfig, kind: str, shapes: Shapes) -> list[Rule]:
    """Rules of a model with a vision tower of the type `kind`, for tensors of these `shapes`."""
    vision, text = config.vision, config.text_transformer
    assert isinstance(vision, ViTConfig)
    if text.norm == "post":
        texts = bert_rules("text_model") + linear("text_model.pooler.dense", "text.pooler")
    else:
        start = "text_model."
        root = start * (2 if any(name.startswith(start * 2) for name in shapes) else 1)
        texts = [
            dataclasses.replace(rule, theirs=root + rule.theirs.removeprefix(start))
            for rule in huggingface.CLIP_RULES
            if rule.theirs.startswith(start)
        ]
    return [
        Rule("logit_scale", "logit_scale", SCALAR),
        *vision_rules(kind, vision, shapes, "vision_model."),
        *linear("visual_projection", "vision.projection", bias=False),
        *texts,
        *linear("text_projection", "text.projection", bias=False),
    ]


def _part(
    values: dict[str, Any], part: str, known: dict[str, dict[str, Any]], where: str
) -> tuple[dict[str, Any], str]:
    """Return the fields of a tower, and its type."""
    place = f"{where}: {part}_config"
    given = fields(values.get(f"{part}_config"), place)
    return given, choice(given.get("model_type"), known, f"{place}.model_type")


def _text(given: dict[str, Any], kind: str, where: str) -> TextConfig:
    if kind != "clip_text_model":
        return bert_text(given, kind, where)
    text = huggingface.fields_of_tower(given, TEXTS[kind], where)
    return huggingface.clip_text(text, "clip", where)


def bert_text(given: dict[str, Any], kind: str, where: str) -> TextConfig:
    """Configuration of a BERT or RoBERTa with its pooler, from the fields `given`.

    Raises:
        CheckpointError: an option that vlm does not support, or a field of another type or size.
    """
    text = huggingface.fields_of_tower(given, TEXTS[kind], where)
    pad_id = text["pad_token_id"]
    for field, plain in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        choice(given.get(field, plain), (plain,), f"{where}.{field}")
    choice(pad_id, (0 if kind == "bert" else PAD_ID,), f"{where}.pad_token_id")
    options = huggingface.tower_options(text, where)
    options["context_length"] -= 0 if kind == "bert" else pad_id + 1
    if options["context_length"] < 1:
        raise CheckpointError(
            f"{where}.max_position_embeddings is {text['max_position_embeddings']}, which leaves "
            "no position for a token"
        )
    return TextConfig(
        **options, norm="post", pool="first", pooler=True, pad_id=pad_id, projection="linear"
    )
