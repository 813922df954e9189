"""Dual encoders of transformers with CLIP's vision tower and a BERT-like text tower.

Chinese CLIP (arXiv:2211.01335) has a BERT. AltCLIP (arXiv:2211.06679) has an XLM-RoBERTa whose
normalised output goes through two linear layers, which are one in our model. The embedding of the
only segment and the offset of RoBERTa's positions are folded into the tables as they are read.
"""

from typing import Any

import numpy as np
from etils import epath

from vlm.config import ModelConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weights
from vlm.weights.fields import with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import linear, norm
from vlm.weights.rules import Rule
from vlm.weights.text_encoders import bert_positions, bert_rules

# Defaults of transformers' configuration classes.
_TEXT: dict[str, dict[str, Any]] = {
    "chinese_clip": huggingface.BERT,
    "altclip": {
        "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024,
        "intermediate_size": 4096, "vocab_size": 250002, "max_position_embeddings": 514,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1, "project_dim": 768,
    },
}  # fmt: skip
_PROJECTION = {"chinese_clip": 512, "altclip": 768}
# Length to which the authors pad texts; the towers have positions for more.
_LENGTH = {"chinese_clip": 52, "altclip": 77}
MODEL_TYPES = tuple(_TEXT)


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    family = values["model_type"]
    return huggingface.assemble(
        folder,
        config,
        rules(family),
        tensors=_fold(weights(folder, *huggingface.WEIGHTS), config.text_transformer, family),
        context_length=min(_LENGTH[family], config.text.context_length),
    )


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of these families."""
    family = values["model_type"]
    altclip = family == "altclip"
    text, options = huggingface.read_tower(values, "text", _TEXT[family], where)
    if altclip:
        options["context_length"] -= text["pad_token_id"] + 1
    return ModelConfig(
        huggingface.clip_vision(values, where),
        TextConfig(
            **options,
            norm="post",
            last_norm=altclip,
            pool="first",
            pad_id=text["pad_token_id"],
            projection="linear_bias" if altclip else "linear",
        ),
        embed_dim=with_defaults(values, {"projection_dim": _PROJECTION[family]}, where)[
            "projection_dim"
        ],
    )


def _fold(tensors: Tensors, config: TextConfig, family: str) -> ComputedTensors:
    """Compute the tables of our text tower, and AltCLIP's projection from its two layers."""
    if family != "altclip":
        return ComputedTensors(tensors, *bert_positions(tensors, "text_model", config, 0))
    assert config.pad_id is not None
    computed, used = bert_positions(tensors, "text_model.roberta", config, config.pad_id + 1)
    layers = [f"text_model.transformation.{end}" for end in ("weight", "bias")]
    second = "text_projection.weight"
    if missing := [name for name in (*layers, second) if name not in tensors.shapes]:
        raise CheckpointError(f"{tensors.where} has no {', '.join(missing)}: download it again")

    def joined(first: str) -> np.ndarray:
        factors = [tensors.read(name).astype(np.float64) for name in (second, first)]
        return (factors[0] @ factors[1]).astype(np.float32)

    embed_dim = tensors.shapes[second][0]
    computed[second] = (
        (embed_dim, config.width), lambda start, stop: joined(layers[0])[start:stop]
    )  # fmt: skip
    computed["text_projection.bias"] = (
        (embed_dim,), lambda start, stop: joined(layers[1])[start:stop]
    )  # fmt: skip
    # transformers saves AltCLIP's layers under the names of XLM-R, in both towers.
    for old in [name for name in tensors.shapes if ".encoder.layer." in name]:
        computed[old.replace(".encoder.layer.", ".encoder.layers.")] = (
            tensors.shapes[old], lambda start, stop, old=old: tensors.read(old, start, stop)
        )  # fmt: skip
        used.add(old)
    return ComputedTensors(tensors, computed, {*used, *layers})


def rules(family: str) -> list[Rule]:
    """Rules of a model whose tensors are folded."""
    image = [rule for rule in huggingface.CLIP_RULES if not str(rule.ours).startswith("text.")]
    if family == "altclip":
        text = bert_rules("text_model.roberta", "layers")
        text += norm("text_model.pre_LN", "text.norm")
    else:
        text = bert_rules("text_model")
    return [
        *image, *text, *linear("text_projection", "text.projection", bias=family == "altclip")
    ]  # fmt: skip
