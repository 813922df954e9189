"""Hugging Face folders: `CLIPModel`, `SiglipModel` and NaFlex, as `save_pretrained` writes them.

A `config.json` holds only what differs from the defaults of its time, so those defaults are here.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from vlm.config import (
    Activation,
    GroupViTConfig,
    ModelConfig,
    PreprocessConfig,
    TextConfig,
    ViTConfig,
    XCLIPConfig,
)
from vlm.errors import CheckpointError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import choice, fields, integer, read_json, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import MLP, TRANSFORMERS, block, linear, norm
from vlm.weights.processors import huggingface_preprocess
from vlm.weights.resolution import Positions
from vlm.weights.rules import CONV, OUT, SCALAR, SCALAR_1, Rule, leading
from vlm.weights.vocabularies import huggingface_tokenizer

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# Defaults of transformers' configuration classes.
_TOWER = {
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768,
    "intermediate_size": 3072,
}  # fmt: skip
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = _TOWER | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
BERT: dict[str, Any] = _TOWER | {
    "vocab_size": 30522, "max_position_embeddings": 512, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "vision": _TOWER | _CLIP | {"image_size": 224, "patch_size": 32},
        "text": _CLIP
        | {
            "num_hidden_layers": 12, "num_attention_heads": 8, "hidden_size": 512,
            "intermediate_size": 2048, "vocab_size": 49408, "max_position_embeddings": 77,
            "eos_token_id": 49407,
        },
        "model": {"projection_dim": 512},
    },
    "siglip": {
        "vision": _SIGLIP | {"image_size": 224, "patch_size": 16, "vision_use_head": True},
        "text": _SIGLIP
        | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None},
        "model": {},
    },
}  # fmt: skip
DEFAULTS["siglip2"] = DEFAULTS["siglip"] | {
    "vision": {k: v for k, v in DEFAULTS["siglip"]["vision"].items() if k != "image_size"}
    | {"num_patches": 256}
}
DEFAULTS["metaclip_2"] = DEFAULTS["clip"]
MODEL_TYPES = tuple(DEFAULTS)
# Classes of transformers with one tower, or with another head in place of the projections.
_PARTIAL = re.compile(r"For[A-Z]\w*$|VisionModel$|TextModel$|WithProjection$")
WEIGHTS = ("model", "pytorch_model")  # their names without the ending, best first


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    return assemble(folder, config, RULES[values["model_type"]])


def assemble(
    folder: epath.Path,
    config: ModelConfig,
    rules: Sequence[Rule],
    *,
    tensors: Tensors | None = None,
    tokenizer: Tokenizer | None = None,
    preprocess: PreprocessConfig | None = None,
    ignored: Callable[[str], bool] = lambda name: name.endswith(".position_ids"),  # buffers
    positions: Positions = "bicubic",
    context_length: int | None = None,
) -> Checkpoint:
    """Combine the config and rules of a model with the other files of its folder.

    Raises:
        CheckpointError: a file is missing, or the tokenizer is of another model.
    """
    tokenizer = tokenizer or huggingface_tokenizer(folder, config)
    if config.text_transformer.pad_id not in (None, tokenizer.config.pad_id):
        raise CheckpointError(
            f"{folder} pads texts with token {tokenizer.config.pad_id}, and its config.json has "
            f"pad_token_id {config.text_transformer.pad_id}: they belong to different models"
        )
    return Checkpoint(
        folder.name,
        config,
        preprocess or preprocess_config(folder, config.vision.image_size),
        tokenizer,
        weights(folder, *WEIGHTS) if tensors is None else tensors,
        rules,
        ignored,
        positions,
        context_length=context_length,
    )


def preprocess_config(folder: epath.Path, image_size: int) -> PreprocessConfig:
    """Read the image processor, from `processor_config.json` first, as transformers does."""
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
    """Configuration of a model of these families."""
    family = values["model_type"]
    defaults = DEFAULTS[family]
    if family in ("clip", "metaclip_2"):
        text = tower_fields(values, "text", defaults["text"], where)
        return ModelConfig(
            clip_vision(values, where),
            clip_text(text, family, f"{where}: text_config"),
            embed_dim=with_defaults(values, defaults["model"], where)["projection_dim"],
            loss="softmax",
        )
    vision = tower_fields(values, "vision", defaults["vision"], where)
    text, options = read_tower(values, "text", defaults["text"], where)
    return ModelConfig(
        siglip_vision(vision, family, f"{where}: vision_config"),
        TextConfig(**options, pool="last", projection="linear_bias"),
        embed_dim=integer(
            text["projection_size"] or text["hidden_size"], f"{where}: text_config.projection_size"
        ),
        loss="sigmoid",
        init_scale=10.0,
        init_bias=-10.0,
    )


def clip_vision(values: dict[str, Any], where: str) -> ViTConfig:
    """Configuration of CLIP's vision tower, with its projection."""
    _, options = read_tower(values, "vision", DEFAULTS["clip"]["vision"], where)
    return ViTConfig(**options, **CLIP_VISION, projection="linear")


CLIP_VISION: dict[str, Any] = {"pool": "class", "pre_norm": True, "patch_bias": False}


def clip_text(text: dict[str, Any], family: str, where: str) -> TextConfig:
    """Configuration of the text tower with these fields, with its projection."""
    # CLIP's eos_token_id of 2 is an old mistake: such a model pools at the highest id. That of
    # MetaCLIP 2 is XLM-R's own.
    end = text["eos_token_id"]
    pool: dict[str, Any] = {"pool": "end", "end_id": end}
    if family == "clip" and end == 2:
        pool = {"pool": "argmax"}
    return TextConfig(**tower_options(text, where), causal=True, projection="linear", **pool)


def siglip_vision(vision: dict[str, Any], family: str, where: str) -> ViTConfig:
    """Configuration of SigLIP's vision tower with these fields."""
    naflex = family == "siglip2"
    if naflex:  # a square grid of positions, and as many patches at most as it has
        grid = math.isqrt(vision["num_patches"])
        if grid**2 != vision["num_patches"]:
            raise CheckpointError(f"{where}.num_patches {vision['num_patches']} is not a square")
        vision = vision | {"image_size": grid * vision["patch_size"]}
    if not vision["vision_use_head"]:
        raise CheckpointError(f"{where}: a SigLIP vision tower without a head has no embedding")
    return ViTConfig(
        **tower_options(vision, where),
        pool="map",
        max_patches=vision["num_patches"] if naflex else None,
    )


def read_tower(
    values: dict[str, Any], part: str, defaults: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `tower_fields` and the `tower_options` that they make."""
    given = tower_fields(values, part, defaults, where)
    return given, tower_options(given, f"{where}: {part}_config")


def without_class(
    values: dict[str, Any],
    known: Sequence[str],
    family: str,
    where: str,
    purpose: str = "to embed images and texts",
) -> dict[str, Any]:
    """Return a model's config without its classes, which must be among the `known` ones.

    Raises:
        CheckpointError: another class of the family.
    """
    names = values.get("architectures") or [*known]
    if not isinstance(names, list) or not set(map(str, names)) <= set(known):
        raise CheckpointError(
            f"{where} describes {brief(names)}: of {family}, vlm reads {' and '.join(known)} "
            f"{purpose}"
        )
    return values | {"architectures": None}


def tower_fields(
    values: dict[str, Any], part: str, defaults: dict[str, Any], where: str
) -> dict[str, Any]:
    """Read the fields of one tower, "vision" or "text", with the defaults of its class.

    Raises:
        CheckpointError: a model without both towers, a field of another type or size, or images
            that are not RGB.
    """
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and _PARTIAL.search(name):
        raise CheckpointError(
            f"{where} describes a {brief(name)}, which lacks a tower or a projection: "
            "give the dual encoder that it was made from"
        )
    name = f"{part}_config_dict" if values.get(f"{part}_config_dict") else f"{part}_config"
    return fields_of_tower(
        fields(values.get(name), f"{where}: {name}"), defaults, f"{where}: {part}_config"
    )


def fields_of_tower(given: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields `given` of a tower, with the defaults of its class.

    Raises:
        CheckpointError: a field of another type or size, or images that are not RGB.
    """
    channels = integer(given.get("num_channels") or 3, f"{where}.num_channels")
    if channels != 3:
        raise CheckpointError(f"{where}: images have {channels} channels: vlm supports only RGB")
    return with_defaults(given, defaults, where)


_SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "layer_norm_eps": "norm_eps",
}
_INPUTS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}


def tower_options(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert the sizes, activation and epsilon of one tower to fields of our configuration."""
    names = _SIZES | {theirs: ours for theirs, ours in _INPUTS.items() if theirs in values}
    activation = ACTIVATIONS[choice(values["hidden_act"], ACTIVATIONS, f"{where}.hidden_act")]
    return {ours: values[theirs] for theirs, ours in names.items()} | {"activation": activation}


def tower_values(c: ViTConfig | XCLIPConfig | GroupViTConfig | TextConfig) -> dict[str, Any]:
    """Sizes, activation and epsilon of one of our towers, as fields of transformers."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_new"}
    depth = {"num_hidden_layers": sum(c.depths)} if isinstance(c, GroupViTConfig) else {}
    sizes = {theirs: getattr(c, ours) for theirs, ours in _SIZES.items() if theirs not in depth}
    return sizes | depth | {"hidden_act": names[c.activation]}


def _encoder(theirs: str, ours: str) -> list[Rule]:
    return block(f"{theirs}.encoder.layers.{{}}", f"{ours}.transformer.blocks", TRANSFORMERS)


CLIP_RULES: list[Rule] = [
    Rule("logit_scale", "logit_scale", SCALAR),
    Rule("vision_model.embeddings.class_embedding", "vision.class_token"),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision.stem.kernel", CONV),
    Rule("vision_model.embeddings.position_embedding.weight", "vision.position"),
    *norm("vision_model.pre_layrnorm", "vision.pre_norm"),  # their spelling
    *_encoder("vision_model", "vision"),
    *norm("vision_model.post_layernorm", "vision.norm"),
    *linear("visual_projection", "vision.projection", bias=False),
    Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "text.position"),
    *_encoder("text_model", "text"),
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
    *_encoder("vision_model", "vision"),
    *norm("vision_model.post_layernorm", "vision.norm"),
    Rule(f"{_HEAD}.probe", "vision.pool.probe", leading(1)),
    *block(
        _HEAD,
        "vision.pool",
        {"attention.qkv": "attention.in_proj_", "attention.out": "attention.out_proj"}
        | {"norm": "layernorm", **MLP},
    ),
    Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "text.position"),
    *_encoder("text_model", "text"),
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
