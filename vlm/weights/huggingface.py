"""Hugging Face folders: `CLIPModel`, `SiglipModel` and NaFlex, as `save_pretrained` writes them.

A `config.json` holds only what differs from the defaults of its time, so those defaults are here.
"""

import math
import os
import re
from typing import Any

from etils import epath

from vlm.config import Activation, ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import fields, integer, read_json, show, with_defaults
from vlm.weights.layers import fused, heads, linear, norm, out
from vlm.weights.processors import huggingface_preprocess
from vlm.weights.rules import CONV, OUT, SCALAR, SCALAR_1, Rule, leading
from vlm.weights.vocabularies import check_vocabulary, huggingface_tokenizer

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# The defaults of transformers' configuration classes.
_TOWER = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
}
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "vision": _TOWER
        | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        "text": {
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        },
        "model": {"projection_dim": 512},
    },
    "siglip": {
        "vision": _TOWER
        | {
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": True,
        },
        "text": _TOWER
        | {
            "vocab_size": 32000,
            "max_position_embeddings": 64,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "projection_size": None,
        },
        "model": {},
    },
}
DEFAULTS["siglip2"] = DEFAULTS["siglip"] | {
    "vision": {k: v for k, v in DEFAULTS["siglip"]["vision"].items() if k != "image_size"}
    | {"num_patches": 256}
}
DEFAULTS["metaclip_2"] = DEFAULTS["clip"]
MODEL_TYPES = tuple(DEFAULTS)
# Classes of transformers with one tower, or with another head in place of the projections.
_PARTIAL = re.compile(r"For[A-Z]\w*$|VisionModel$|TextModel$|WithProjection$")
WEIGHTS = ("model", "pytorch_model")  # their names without the ending, best first


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: it is incomplete, torn or contradictory.
    """
    values = read_json(folder / "config.json")
    config = model_config(values, os.fspath(folder / "config.json"))
    family = values["model_type"]
    tokenizer = huggingface_tokenizer(folder, config)
    check_vocabulary(tokenizer, config, folder)
    return Checkpoint(
        folder.name,
        config,
        preprocess_config(folder, config.vision.image_size),
        tokenizer,
        weights(folder, *WEIGHTS),
        RULES[family],
        ignored,
        "bicubic",
    )


def preprocess_config(folder: epath.Path, image_size: int) -> PreprocessConfig:
    """From the part of `processor_config.json` that holds it, or `preprocessor_config.json`.

    In this order, as transformers does.
    """
    path = folder / "processor_config.json"
    if path.exists() and (values := read_json(path).get("image_processor")):
        where = f"{path}: image_processor"
        return huggingface_preprocess(fields(values, where), where, image_size)
    path = folder / "preprocessor_config.json"
    if path.exists():
        return huggingface_preprocess(read_json(path), os.fspath(path), image_size)
    raise CheckpointError(
        f"{folder} has no preprocessor_config.json: save or download the processor beside the model"
    )


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our configuration of a `config.json` of these families.

    Raises:
        CheckpointError: an unknown activation, or a size that cannot be.
    """
    family = values["model_type"]
    check_architecture(values.get("architectures"), where)
    defaults = DEFAULTS[family]
    parts = {}
    for part in ("vision", "text"):
        parts[part] = tower_fields(values, part, defaults[part], where)
    vision, text = parts["vision"], parts["text"]
    naflex = family == "siglip2"
    if naflex:  # a square grid of positions, and as many patches at most as it has
        grid = math.isqrt(vision["num_patches"])
        if grid**2 != vision["num_patches"]:
            raise CheckpointError(
                f"{where}: vision_config.num_patches {vision['num_patches']} is not a square"
            )
        vision["image_size"] = grid * vision["patch_size"]
    vision_tower: dict[str, Any] = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        **tower_sizes(vision, f"{where}: vision_config"),
    }
    text_tower: dict[str, Any] = {
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        **tower_sizes(text, f"{where}: text_config"),
    }
    if family in ("clip", "metaclip_2"):
        # CLIP's eos_token_id of 2 is an old mistake: such a model pools at the highest id. That of
        # MetaCLIP 2 is XLM-R's own.
        end = text["eos_token_id"]
        pool: dict[str, Any] = {"pool": "end", "end_id": end}
        if family == "clip" and end == 2:
            pool = {"pool": "argmax"}
        return ModelConfig(
            ViTConfig(
                **vision_tower, pool="class", pre_norm=True, patch_bias=False, projection="linear"
            ),
            TextConfig(**text_tower, causal=True, projection="linear", **pool),
            embed_dim=with_defaults(values, defaults["model"], where)["projection_dim"],
            loss="softmax",
        )
    if not vision["vision_use_head"]:
        raise CheckpointError(f"{where}: a SigLIP vision tower without its head makes no embedding")
    return ModelConfig(
        ViTConfig(
            **vision_tower,
            pool="map",
            max_patches=vision["num_patches"] if naflex else None,
        ),
        TextConfig(**text_tower, pool="last", projection="linear_bias"),
        embed_dim=integer(
            text["projection_size"] or text["hidden_size"], f"{where}: text_config.projection_size"
        ),
        loss="sigmoid",
        init_scale=10.0,
        init_bias=-10.0,
    )


def tower_fields(
    values: dict[str, Any], part: str, defaults: dict[str, Any], where: str
) -> dict[str, Any]:
    """The fields of one tower, "vision" or "text", with the defaults of its class.

    Raises:
        CheckpointError: a field of another type or size, or images that are not RGB.
    """
    name = f"{part}_config_dict" if values.get(f"{part}_config_dict") else f"{part}_config"
    given = fields(values.get(name), f"{where}: {name}")
    channels = integer(given.get("num_channels") or 3, f"{where}: {part}_config.num_channels")
    if channels != 3:
        raise CheckpointError(f"{where}: images have {channels} channels, and vlm takes RGB alone")
    return with_defaults(given, defaults, f"{where}: {part}_config")


def check_architecture(names: Any, where: str) -> None:
    """Refuse what shares a family's `model_type` and is no dual encoder."""
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and _PARTIAL.search(name):
        raise CheckpointError(
            f"{where} describes a {show(name)}, which has not both towers with their projections: "
            "give the dual encoder that it was made from"
        )


def tower_sizes(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Our fields for the sizes, activation and epsilon of one tower."""
    name = values["hidden_act"]
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{where} has the activation {name!r}: vlm knows {', '.join(ACTIVATIONS)}"
        )
    return {
        "width": values["hidden_size"],
        "depth": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "mlp_dim": values["intermediate_size"],
        "activation": ACTIVATIONS[name],
        "norm_eps": values["layer_norm_eps"],
    }


def tower_values(c: ViTConfig | TextConfig) -> dict[str, Any]:
    """The fields that `tower_sizes` reads, of a tower of ours."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_new"}
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_dim,
        "hidden_act": names[c.activation],
        "layer_norm_eps": c.norm_eps,
    }


# --------------------------------------------------------------------- their names and ours


def _blocks(theirs: str, ours: str) -> list[Rule]:
    layer, block = f"{theirs}.encoder.layers.{{}}", f"{ours}.transformer.blocks"
    return [
        *norm(f"{layer}.layer_norm1", f"{block}.attention_norm"),
        *heads(f"{layer}.self_attn.q_proj", f"{block}.attention.query"),
        *heads(f"{layer}.self_attn.k_proj", f"{block}.attention.key"),
        *heads(f"{layer}.self_attn.v_proj", f"{block}.attention.value"),
        *out(f"{layer}.self_attn.out_proj", f"{block}.attention.out"),
        *norm(f"{layer}.layer_norm2", f"{block}.mlp_norm"),
        *linear(f"{layer}.mlp.fc1", f"{block}.mlp.up"),
        *linear(f"{layer}.mlp.fc2", f"{block}.mlp.down"),
    ]


CLIP_RULES: list[Rule] = [
    Rule("logit_scale", "logit_scale", SCALAR),
    Rule("vision_model.embeddings.class_embedding", "vision.class_token"),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision.stem.kernel", CONV),
    Rule("vision_model.embeddings.position_embedding.weight", "vision.position"),
    *norm("vision_model.pre_layrnorm", "vision.pre_norm"),  # their spelling
    *_blocks("vision_model", "vision"),
    *norm("vision_model.post_layernorm", "vision.norm"),
    *linear("visual_projection", "vision.projection", bias=False),
    Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "text.position"),
    *_blocks("text_model", "text"),
    *norm("text_model.final_layer_norm", "text.norm"),
    *linear("text_projection", "text.projection", bias=False),
]

_HEAD = "vision_model.head"
SIGLIP_RULES: list[Rule] = [
    Rule("logit_scale", "logit_scale", SCALAR_1),
    Rule("logit_bias", "logit_bias", SCALAR_1),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision.stem.kernel", CONV),
    Rule("vision_model.embeddings.patch_embedding.bias", "vision.stem.bias"),
    Rule("vision_model.embeddings.position_embedding.weight", "vision.position"),
    *_blocks("vision_model", "vision"),
    *norm("vision_model.post_layernorm", "vision.norm"),
    Rule(f"{_HEAD}.probe", "vision.pool.probe", leading(1)),
    *fused(
        f"{_HEAD}.attention.in_proj_weight",
        f"{_HEAD}.attention.in_proj_bias",
        "vision.pool.attention",
        ("query", "key", "value"),
    ),
    *out(f"{_HEAD}.attention.out_proj", "vision.pool.attention.out"),
    *norm(f"{_HEAD}.layernorm", "vision.pool.norm"),
    *linear(f"{_HEAD}.mlp.fc1", "vision.pool.mlp.up"),
    *linear(f"{_HEAD}.mlp.fc2", "vision.pool.mlp.down"),
    Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "text.position"),
    *_blocks("text_model", "text"),
    *norm("text_model.final_layer_norm", "text.norm"),
    *linear("text_model.head", "text.projection"),
]
# NaFlex: the stem is a Linear over flattened patches.
_STEM = "vision_model.embeddings.patch_embedding.weight"
SIGLIP2_RULES: list[Rule] = [
    Rule(_STEM, "vision.stem.kernel", OUT) if rule.theirs == _STEM else rule
    for rule in SIGLIP_RULES
]
RULES = {
    "clip": CLIP_RULES,
    "metaclip_2": CLIP_RULES,
    "siglip": SIGLIP_RULES,
    "siglip2": SIGLIP2_RULES,
}


def ignored(name: str) -> bool:
    """Buffers that older versions saved and that hold nothing learned."""
    return name.endswith(".position_ids")
