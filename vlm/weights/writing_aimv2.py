"""Export to transformers' `Aimv2Model` and `Aimv2VisionModel`."""

import math
from collections.abc import Iterator
from typing import Any

from vlm.config import ModelConfig, NoTextConfig, TextConfig, ViTConfig
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import aimv2
from vlm.weights import writing_parts as parts
from vlm.weights.huggingface import tower_values
from vlm.weights.rules import LazyTensor, Rule, flat_arrays, write


def is_aimv2(config: ModelConfig) -> bool:
    """Whether transformers' class for a model is AIMv2's."""
    return isinstance(config.vision, ViTConfig) and config.vision.pool == "probe"


def aimv2_config(model: DualEncoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists the fields that transformers' class does not support.
    """
    config, vision, text = model.config, model.config.vision, model.config.text
    assert isinstance(vision, ViTConfig)
    zeros = zero_biases(model)
    sides = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    vision_values = _tower(vision, "vision_model.", zeros) | sides
    if isinstance(text, NoTextConfig):
        vision_values = _tower(vision, "", zeros) | sides
        values = parts.model_values("aimv2_vision_model", "Aimv2VisionModel", **vision_values)
    else:
        text = config.text_transformer
        text_values = _tower(text, "text_model.", zeros) | {
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "eos_token_id": text.end_id,
            "bos_token_id": tokenizer.config.bos_id,
            "pad_token_id": tokenizer.config.pad_id,
            "model_type": "aimv2_text_model",
        }
        values = parts.model_values(
            "aimv2",
            "Aimv2Model",
            vision_config=vision_values | {"model_type": "aimv2_vision_model"},
            text_config=text_values,
            projection_dim=config.embed_dim,
            # Rounding in the file and in transformers must not lower the scale.
            max_logit_scale=max(100.0, 1.001 * math.exp(float(model.logit_scale[...]))),
        )
    parts.refuse_differences("transformers", config, aimv2.model_config(values, "config.json"))
    return values


def aimv2_tensors(model: DualEncoder) -> Iterator[tuple[str, LazyTensor]]:
    """Return the tensors of a model, without the biases that `zero_biases` names."""
    zeros = zero_biases(model)
    rules = [rule for rule in _rules(model.config) if rule.theirs not in zeros]
    left_out = [rule.ours for rule in _rules(model.config) if rule.theirs in zeros]
    alone = ["logit_scale"] * isinstance(model.config.text, NoTextConfig)
    return write(model, rules, computed=[*map(str, left_out), *alone])


def zero_biases(model: DualEncoder) -> set[str]:
    """Names in the file of the biases that a config turns off: all of their kind are zeros."""
    arrays = dict(flat_arrays(model))
    groups: dict[tuple[str, bool], list[Rule]] = {}
    for rule in _rules(model.config):
        if rule.theirs.endswith(".bias") and aimv2.is_optional_bias(rule.theirs):
            group = str(rule.ours).partition(".")[0], ".ffn." in rule.theirs
            groups.setdefault(group, []).append(rule)
    return {
        rule.theirs
        for group in groups.values()
        if not any(bool(arrays[str(rule.ours)].any()) for rule in group)
        for rule in group
    }


def _rules(config: ModelConfig) -> list[Rule]:
    return aimv2.vision_rules("") if isinstance(config.text, NoTextConfig) else aimv2.rules()


def _tower(c: ViTConfig | TextConfig, root: str, zeros: set[str]) -> dict[str, Any]:
    values = tower_values(c) | {"hidden_act": "silu", "rms_norm_eps": c.norm_eps}
    del values["layer_norm_eps"]
    layer = f"{root}encoder.layers.{{}}"
    return values | {
        "qkv_bias": f"{layer}.attention.q_proj.bias" not in zeros,
        "mlp_bias": f"{layer}.ffn.up_proj.bias" not in zeros,
    }
