"""transformers' `BlipForImageTextRetrieval`: the contrastive half of BLIP (arXiv:2201.12086).

The text encoder reads texts alone, without its cross-attention; the matching head is left out. The
class has no temperature: the logits are the cosines.
"""

import logging
from typing import Any

from etils import epath

from vlm.config import ModelConfig, TextConfig, ViTConfig
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import with_defaults
from vlm.weights.layers import MLP, block, conv, linear, norm
from vlm.weights.one_tower import SCALE, with_scale
from vlm.weights.rules import Rule, leading
from vlm.weights.text_encoders import bert_rules

_log = logging.getLogger(__name__)
MODEL_TYPES = ("blip",)
# Defaults of transformers' configuration classes.
_VISION = {
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768,
    "intermediate_size": 3072, "image_size": 384, "patch_size": 16, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_TEXT = huggingface.BERT | {"vocab_size": 30524, "num_attention_heads": 8}
_MODEL = {"image_text_hidden_size": 256}
_CLASS = "BlipForImageTextRetrieval"
_LAYERS = {
    "attention_norm": "layer_norm1", "attention.qkv": "self_attn.qkv.",
    "attention.out": "self_attn.projection", "mlp_norm": "layer_norm2", **MLP,
}  # fmt: skip


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family.

    Raises:
        CheckpointError: another class of BLIP, which has no contrastive half.
    """
    values = huggingface.without_class(values, [_CLASS], "BLIP", where)
    _, image = huggingface.read_tower(values, "vision", _VISION, where)
    text, options = huggingface.read_tower(values, "text", _TEXT, where)
    return ModelConfig(
        ViTConfig(**image, pool="class", projection="linear_bias"),
        TextConfig(
            **options,
            norm="post",
            pool="first",
            pad_id=text["pad_token_id"],
            projection="linear_bias",
        ),
        embed_dim=with_defaults(values, _MODEL, where)["image_text_hidden_size"],
        init_scale=1.0,
    )


def log_uncalibrated(name: str) -> None:
    """Log that a model without a temperature has cosines as logits."""
    _log.info(
        "%s has no temperature: its logits are cosines, and probabilities of labels are almost "
        "equal until ZeroShotClassifier.calibrate fits a temperature on 100 labelled images or so",
        name,
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    log_uncalibrated(folder.name)
    return huggingface.assemble(
        folder,
        config,
        rules(),
        tensors=with_scale(weights(folder, *huggingface.WEIGHTS), config),
        ignored=lambda name: (
            name.startswith("itm_head.")
            or ".crossattention." in name
            or name.endswith(".position_ids")
        ),
    )


def rules() -> list[Rule]:
    """Rules of a model."""
    return [
        SCALE,
        *vision_rules(),
        *linear("vision_proj", "vision.projection"),
        *bert_rules("text_encoder"),
        *linear("text_proj", "text.projection"),
    ]


def vision_rules() -> list[Rule]:
    """Rules of the vision tower without its projection, which BLIP-2's is too."""
    tables = "vision_model.embeddings"
    return [
        Rule(f"{tables}.class_embedding", "vision.class_token", leading(2)),
        Rule(f"{tables}.position_embedding", "vision.position", leading(1)),
        *conv(f"{tables}.patch_embedding", "vision.stem"),
        *block("vision_model.encoder.layers.{}", "vision.transformer.blocks", _LAYERS),
        *norm("vision_model.post_layernorm", "vision.norm"),
    ]
