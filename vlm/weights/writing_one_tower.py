"""Export of a vision tower alone to the classes of transformers that `vision_towers` reads."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from vlm.config import ModelConfig, NoTextConfig, PreprocessConfig, ViTConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import writing_parts as parts
from vlm.weights.huggingface import tower_values
from vlm.weights.layers import linear
from vlm.weights.rules import LazyTensor, write
from vlm.weights.vision_towers import vision_config, vision_rules

_CLASSES = {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "internvl_vision": "InternVLVisionModel",
}


def is_one_tower(config: ModelConfig) -> bool:
    """Whether a model is a ViT alone."""
    return isinstance(config.text, NoTextConfig) and isinstance(config.vision, ViTConfig)


def one_tower_config(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of a vision tower.

    Raises:
        CheckpointError: lists the fields that transformers' nearest class does not support.
    """
    c = config.vision
    assert isinstance(c, ViTConfig)
    kind = _kind(c)
    if c.pool == "class":  # which has the token in any case
        c = dataclasses.replace(c, class_token=False)
    values = tower_values(c) | {"image_size": c.image_size, "patch_size": c.patch_size}
    if kind == "siglip2_vision_model":
        values["num_patches"] = c.max_patches
        del values["image_size"]
    if kind.startswith("dinov2"):
        gated = c.mlp != "plain"
        ratio = c.mlp_dim * (1.5 if gated else 1) / c.width
        # transformers takes whole ratios; another one differs from the tower, and is refused.
        values |= {"use_swiglu_ffn": gated, "mlp_ratio": max(1, round(ratio))}
        del values["intermediate_size"]
    if kind in ("dinov2_with_registers", "dinov3_vit"):
        values["num_register_tokens"] = c.registers
    if kind == "dinov3_vit":
        gated = c.mlp != "plain"
        values |= {"rope_theta": c.rotary_base, "key_bias": c.key_bias, "use_gated_mlp": gated}
        values["hidden_act"] = "silu" if gated else values["hidden_act"]
    if kind == "internvl_vision":
        values |= {"attention_bias": True, "use_mean_pooling": c.pool == "mean"}
        values["use_qk_norm"] = c.qk_norm
        values["norm_type"] = "rms_norm" if c.norm_kind == "rms" else "layer_norm"
    made = vision_config(values, kind, "config.json")
    # Fields that the tensors show, and those of training.
    shown = {"pooler": c.pooler, "dropout": c.dropout, "patch_dropout": c.patch_dropout}
    shown |= {"projection": c.projection} if kind == "clip_vision_model" else {}
    made, fields = dataclasses.replace(made, **shown), dataclasses.asdict(c)
    faults = {
        f"vision.{name} {value!r} ({getattr(made, name)!r})": getattr(made, name) != value
        for name, value in fields.items()
    }
    faults["vision.pooler"] = c.pooler and kind != "vit"
    faults["vision.projection"] = c.projection not in ("none", "linear")
    parts.refuse_if("transformers", faults)
    name = _CLASSES[kind]
    if c.projection == "linear":
        name, values["projection_dim"] = f"{name}WithProjection", config.embed_dim
    return parts.model_values(kind, name, **values)


def one_tower_tensors(model: DualEncoder, kind: str) -> Iterator[tuple[str, LazyTensor]]:
    """Return the tensors of a model with the `config.json` of the type `kind`."""
    c = model.config.vision
    assert isinstance(c, ViTConfig)
    projected = c.projection == "linear"
    rules = vision_rules(kind, c, {}, "vision_model." if projected else "")
    if projected:
        rules += linear("visual_projection", "vision.projection", bias=False)
    return write(model, rules, computed=("logit_scale",))


def one_tower_processor(c: PreprocessConfig, kind: str) -> str:
    """Return the name of the image processor, for `preprocessor_config.json`."""
    if kind == "dinov3_vit" and c.backend == "tensor" and c.resize == "squash":
        return "DINOv3ViTImageProcessor"
    if c.resize == "crop":
        return "CLIPImageProcessor" if kind.startswith("clip") else "BitImageProcessor"
    return "SiglipImageProcessor" if kind.startswith("siglip") else "ViTImageProcessor"


def _kind(c: ViTConfig) -> str:
    """Type of transformers that is nearest to a tower."""
    if c.pool == "mean" and c.class_token and c.layer_scale:
        return "internvl_vision"
    if c.pool == "map":
        return "siglip_vision_model" if c.max_patches is None else "siglip2_vision_model"
    if c.pre_norm:
        return "clip_vision_model"
    if not c.position:
        return "dinov3_vit"
    whole = c.mlp_dim % c.width == 0 or c.mlp != "plain"  # DINOv2's ratio of the MLP
    if c.layer_scale and not whole and not c.registers:
        return "internvl_vision"
    if c.layer_scale:
        return "dinov2_with_registers" if c.registers else "dinov2"
    return "vit"
