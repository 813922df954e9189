"""AIMv2 of transformers: `Aimv2Model` (AIMv2-LiT) and `Aimv2VisionModel` (arXiv:2411.14402).

Both towers have RMSNorm and SwiGLU. Biases that a config turns off are zeros here.
"""

import dataclasses
import math
import os
from typing import Any

from etils import epath

from vlm.config import ModelConfig, NoTextConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, weights, with_clamped_scale, with_zero_biases
from vlm.weights.fields import choice, fields, number, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import block, conv, heads, linear, rms_norm
from vlm.weights.one_tower import vision_checkpoint
from vlm.weights.rules import SCALAR, Rule, Transform

_VISION_ALONE = "aimv2_vision_model"
MODEL_TYPES = ("aimv2", _VISION_ALONE)
# Defaults of transformers' configuration classes.
_TOWER: dict[str, Any] = {
    "num_hidden_layers": 24, "num_attention_heads": 8, "hidden_size": 1024,
    "intermediate_size": 2816, "hidden_act": "silu", "rms_norm_eps": 1e-5, "qkv_bias": False,
    "mlp_bias": False,
}  # fmt: skip
VISION = _TOWER | {"image_size": 224, "patch_size": 14, "use_head": True, "is_native": False}
TEXT = _TOWER | {
    "num_hidden_layers": 12, "num_attention_heads": 6, "hidden_size": 768,
    "intermediate_size": 2048, "vocab_size": 49408, "max_position_embeddings": 77,
    "eos_token_id": 49407,
}  # fmt: skip
_MODEL = {"projection_dim": 512, "max_logit_scale": 100.0}
_LAYERS = {
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj", "attention.value": "attention.v_proj",
    "attention.out": "attention.out_proj", "mlp.gate": "ffn.gate_proj",
    "mlp.up": "ffn.up_proj", "mlp.down": "ffn.down_proj",
}  # fmt: skip
_PROBE = Transform(
    lambda s: (1, 1, math.prod(s)), lambda x, s: x.reshape(s), lambda x: x.reshape(1, 1, -1)
)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family.

    Raises:
        CheckpointError: an option that vlm does not support, or a field of another type or size.
    """
    if values["model_type"] == _VISION_ALONE:
        vision = _vision(huggingface.fields_of_tower(values, VISION, where), where)
        return ModelConfig(vision, NoTextConfig(), embed_dim=vision.width)
    given = huggingface.tower_fields(values, "vision", VISION, where)
    vision = _vision(given, f"{where}: vision_config")
    text = huggingface.tower_fields(values, "text", TEXT, where)
    return ModelConfig(
        dataclasses.replace(vision, projection="linear"),
        TextConfig(
            **_options(text, f"{where}: text_config"),
            causal=True,
            pool="end",
            end_id=text["eos_token_id"],
            projection="linear",
        ),
        embed_dim=with_defaults(values, _MODEL, where)["projection_dim"],
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or does not fit, or an option that vlm does not support.
    """
    tensors, where = weights(folder, *huggingface.WEIGHTS), os.fspath(folder / "config.json")
    vision = config.vision
    assert isinstance(vision, ViTConfig)
    if values["model_type"] == _VISION_ALONE:
        table = vision_rules("")
        tensors = _without_biases(tensors, table, values)
        preprocess = huggingface.preprocess_config(folder, vision.image_size)
        return vision_checkpoint(folder.name, vision, config.embed_dim, preprocess, tensors, table)
    table = rules()
    for part in ("vision", "text"):
        given = fields(values.get(f"{part}_config"), f"{where}: {part}_config")
        own = [rule for rule in table if rule.theirs.startswith(f"{part}_model.")]
        tensors = _without_biases(tensors, own, given)
    largest = with_defaults(values, _MODEL, where)["max_logit_scale"]
    log = math.log(number(largest, f"{where}: max_logit_scale", above=1.0))
    tensors = with_clamped_scale(tensors, "logit_scale", log)
    return huggingface.assemble(folder, config, table, tensors=tensors)


def rules() -> list[Rule]:
    """Rules of the dual encoder."""
    return [
        Rule("logit_scale", "logit_scale", SCALAR),
        *vision_rules("vision_model."),
        *linear("visual_projection", "vision.projection", bias=False),
        Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
        Rule("text_model.embeddings.position_embedding.weight", "text.position"),
        *_tower("text_model.", "text"),
        *linear("text_projection", "text.projection", bias=False),
    ]


def vision_rules(root: str) -> list[Rule]:
    """Rules of the vision tower without its projection, whose names start with `root`."""
    return [
        *conv(f"{root}embeddings.patch_embed", "vision.stem"),
        *rms_norm(f"{root}embeddings.rms_norm", "vision.stem_norm"),
        Rule(f"{root}embeddings.position_embedding.weight", "vision.position"),
        *_tower(root, "vision"),
        Rule(f"{root}head.cls_token", "vision.pool.probe", _PROBE),
        *heads(f"{root}head.k_proj", "vision.pool.key"),
        *heads(f"{root}head.v_proj", "vision.pool.value"),
        *linear(f"{root}head.output_proj", "vision.pool.out"),
    ]


def _tower(root: str, ours: str) -> list[Rule]:
    layers = f"{root}encoder.layers.{{}}"
    norms = (("rms_norm1", "attention_norm"), ("rms_norm2", "mlp_norm"))
    return [
        *block(layers, f"{ours}.transformer.blocks", _LAYERS),
        *(
            rule
            for name, norm in norms
            for rule in rms_norm(f"{layers}.{name}", f"{ours}.transformer.blocks.{norm}")
        ),
        *rms_norm(f"{root}rms_norm", f"{ours}.norm"),
    ]


def is_optional_bias(name: str) -> bool:
    """Whether `qkv_bias` or `mlp_bias` turns a bias on: not those of the stem and of the output."""
    return ".ffn." in name or ".attention." in name or name.endswith(("k_proj.bias", "v_proj.bias"))


def _without_biases(tensors: Tensors, table: list[Rule], given: dict[str, Any]) -> Tensors:
    """Add biases of zero to the layers of a tower whose config, `given`, turns them off."""

    def off(name: str) -> bool:
        on = given.get("mlp_bias" if ".ffn." in name else "qkv_bias")
        return is_optional_bias(name) and not on

    return with_zero_biases(tensors, table, off)


def _vision(c: dict[str, Any], where: str) -> ViTConfig:
    if not c["use_head"]:
        raise CheckpointError(
            f"{where}.use_head is false: an AIMv2 vision tower without its pooling head has no "
            "embedding, so use one with a head, such as apple/aimv2-large-patch14-224-lit"
        )
    choice(c["is_native"], (False,), f"{where}.is_native")
    return ViTConfig(**_options(c, where), stem_norm=True, pool="probe")


def _options(c: dict[str, Any], where: str) -> dict[str, Any]:
    choice(c["hidden_act"], ("silu",), f"{where}.hidden_act")
    # The activation is that of a plain MLP, which these towers do not have.
    values = c | {"hidden_act": "gelu", "layer_norm_eps": c["rms_norm_eps"]}
    options = huggingface.tower_options(values, where)
    return {**options, "mlp": "swiglu_plain", "norm_kind": "rms"}
