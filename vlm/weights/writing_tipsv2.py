"""Export to transformers' `Tipsv2Model`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm.config import ModelConfig, PreprocessConfig, ViTConfig
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import tipsv2
from vlm.weights import writing_parts as parts
from vlm.weights.rules import write

FORM = "transformers' Tipsv2Model"


def is_tipsv2(config: ModelConfig) -> bool:
    """Return True if no other model of transformers has such towers."""
    return (
        config.text_transformer.positions == "sinusoidal"
        or getattr(config.vision, "registers", 0) > 0
    )


def tipsv2_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists all fields that `Tipsv2Model` does not support.
    """
    vision, text = config.vision, config.text_transformer
    if not isinstance(vision, ViTConfig):
        parts.refuse(FORM, [f"a vision tower of the kind {vision.kind!r} ('vit')"])
    gated, plain = vision.mlp == "swiglu_plain", vision.mlp == "plain"
    parts.check(
        FORM,
        config,
        {"stem": "linear", "patch_bias": True, "rotary": None, "pool": "class", "pre_norm": False}
        | {"norm_pooled": False, "norm": "pre", "attention_norm": False, "key_bias": True}
        | {"projection": "none", "max_patches": None},
        {"causal": False, "pool": "mean", "positions": "sinusoidal", "layer_scale": False}
        | {"norm": "pre", "projection": "none", "pad_id": tokenizer.config.pad_id},
        {
            parts.SIGMOID: config.init_bias is not None or config.loss != "softmax",
            f"vision.mlp {vision.mlp!r} (plain or swiglu_plain)": not gated and not plain,
        },
    )
    tower = parts.vision_values(
        vision,
        "tipsv2",
        mlp_ratio=_ratio(vision.width, vision.mlp_dim, gated=gated),
        use_swiglu_ffn=gated,
        num_register_tokens=vision.registers,
    )
    del tower["intermediate_size"]  # the class has mlp_ratio instead
    values = parts.model_values(
        "tipsv2",
        "Tipsv2Model",
        temperature_init_value=1 / config.init_scale,
        vision_config=tower,
        text_config=parts.text_values(text, "tipsv2", scale_sqrt_depth=text.scale_embedding),
    )
    made = tipsv2.model_config(values, "config.json")
    parts.refuse_differences(FORM, config, made, free=["vision.layer_scale"])
    return values


def _ratio(width: int, mlp_dim: int, *, gated: bool) -> float:
    """Return the ratio from which transformers computes this width of the hidden layer.

    Raises:
        CheckpointError: there is none, because a gated MLP has a multiple of 8.
    """
    ungated = mlp_dim * 3 // 2 if gated else mlp_dim
    for ratio in (ungated / width, (ungated + 0.5) / width):  # the product is rounded down
        if tipsv2.mlp_dim(width, ratio, gated=gated) == mlp_dim:
            return ratio
    parts.refuse(FORM, [f"vision.mlp_dim {mlp_dim} of a gated MLP (a multiple of 8)"])


def tipsv2_tensors(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """Yield all tensors that transformers expects, with the names of the published weights.

    The mask token of pre-training is zero, as published. Absent layer scales are one.
    """
    vision = model.config.vision
    assert isinstance(vision, ViTConfig)  # checked with the config
    rules = tipsv2.rules(model.config, {})
    if not vision.layer_scale:
        scales = [rule.theirs for rule in rules if rule.theirs.endswith(".gamma")]
        rules = [rule for rule in rules if rule.theirs not in scales]
        for name in (scale.format(i) for i in range(vision.depth) for scale in scales):
            yield name, np.ones(vision.width, np.float32)
    if not vision.registers:
        yield "vision_encoder.register_tokens", np.zeros((1, 0, vision.width), np.float32)
    yield "vision_encoder.mask_token", np.zeros((1, vision.width), np.float32)
    yield from write(model, rules)


def tipsv2_preprocess(c: PreprocessConfig) -> dict[str, Any]:
    """Return the `preprocessor_config.json`."""
    if c.backend != "tensor" or c.resize != "squash":
        parts.refuse(FORM, [f"images that {c.backend} resizes by {c.resize} (tensor, squash)"])
    values = parts.processor_values(c, "Tipsv2ImageProcessor")
    if (c.mean, c.std) == ((0.0,) * 3, (1.0,) * 3):
        values["do_normalize"] = False
        del values["image_mean"], values["image_std"]
    return values
