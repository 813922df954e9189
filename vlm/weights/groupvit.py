"""transformers' `GroupViTModel` (Xu et al., 2022, arXiv:2202.11094).

The batch norm of a projection is folded into the layer before it, and written as the identity.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from vlm.config import GroupViTConfig, ModelConfig
from vlm.errors import CheckpointError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import huggingface
from vlm.weights import writing_parts as parts
from vlm.weights.checkpoint import Checkpoint, Computed, ComputedTensors, weights
from vlm.weights.fields import integer, integers, number, with_defaults
from vlm.weights.files import Tensors
from vlm.weights.layers import TRANSFORMERS, block, conv, linear, norm
from vlm.weights.rules import SCALAR, Rule, leading, write

MODEL_TYPES = ("groupvit",)
_CLIP = huggingface.DEFAULTS["clip"]
_VISION: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
    "num_attention_heads": 6, "image_size": 224, "patch_size": 16, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "assign_eps": 1.0, "depths": (6, 3, 3), "num_group_tokens": (64, 8, 0),
    "num_output_groups": (64, 8, 8), "assign_mlp_ratio": None,
}  # fmt: skip
_TEXT = _CLIP["text"] | {
    "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4
}  # fmt: skip
_MODEL = {"projection_dim": 256, "projection_intermediate_dim": 4096}
_PROJECTIONS = {"visual_projection": "vision", "text_projection": "text"}
_NORM_EPS = 1e-5  # of the batch norms
_ASSIGNMENT = {
    "group_norm": "norm_tokens", "token_norm": "norm_x", "mixed_norm": "norm_post_tokens",
    "mlp_norm": "pre_assign_attn.norm2", "attended_norm": "pre_assign_attn.norm_post",
    "segment_norm": "norm_new_x", "query": "assign.q_proj", "key": "assign.k_proj",
    "value": "assign.v_proj", "out": "assign.proj",
}  # fmt: skip
_ATTENTION = {
    name: theirs.replace("self_attn", "pre_assign_attn.attn")
    for name, theirs in TRANSFORMERS.items()
    if name.startswith("attention.")
}


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family.

    Raises:
        CheckpointError: an option that vlm does not support, or a field of another type or size.
    """
    c = huggingface.tower_fields(values, "vision", _VISION, where)
    text = huggingface.tower_fields(values, "text", _TEXT, where)
    model, place = with_defaults(values, _MODEL, where), f"{where}: vision_config"
    depths = integers(c["depths"], f"{place}.depths")
    groups = integers(c["num_group_tokens"], f"{place}.num_group_tokens", low=0)
    made = integers(c["num_output_groups"], f"{place}.num_output_groups", low=0)
    if any(count and count != segments for count, segments in zip(groups, made, strict=False)):
        raise CheckpointError(
            f"{place} has num_group_tokens {list(groups)} and num_output_groups {list(made)}: vlm "
            "supports as many segments as group tokens"
        )
    ratios = c["assign_mlp_ratio"] or (0.5, 4)
    if not isinstance(ratios, list | tuple) or len(ratios) != 2:
        raise CheckpointError(f"{place}.assign_mlp_ratio is {brief(ratios)}, not two numbers")
    group_dim, segment_dim = (
        int(number(ratio, f"{place}.assign_mlp_ratio", above=0.0) * c["hidden_size"])
        for ratio in ratios
    )
    options = huggingface.tower_options(c, place)
    del options["depth"]
    hidden = model["projection_intermediate_dim"]
    tower = huggingface.clip_text(text, "clip", f"{where}: text_config")
    return ModelConfig(
        GroupViTConfig(
            **options,
            depths=depths,
            groups=groups,
            group_mlp_dim=integer(group_dim, f"{place}.assign_mlp_ratio"),
            segment_mlp_dim=integer(segment_dim, f"{place}.assign_mlp_ratio"),
            assign_eps=c["assign_eps"],
            projection="mlp_relu",
            projection_dim=hidden,
        ),
        dataclasses.replace(tower, projection="mlp_relu", projection_dim=hidden),
        embed_dim=model["projection_dim"],
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or does not fit, or an option that vlm does not support.
    """
    tensors = weights(folder, *huggingface.WEIGHTS)
    return huggingface.assemble(
        folder,
        config,
        rules(config),
        tensors=_folded(tensors),
        ignored=lambda name: name.endswith((".position_ids", ".num_batches_tracked")),
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Rules of a model whose batch norms are folded."""
    vision = config.vision
    assert isinstance(vision, GroupViTConfig)
    tables = "vision_model.embeddings"
    table = [
        Rule("logit_scale", "logit_scale", SCALAR),
        *conv(f"{tables}.patch_embeddings.projection", "vision.stem"),
        *norm(f"{tables}.layernorm", "vision.stem_norm"),
        Rule(f"{tables}.position_embeddings", "vision.position", leading(1)),
    ]
    previous = 0
    for stage, groups in enumerate(vision.groups):
        theirs, ours = f"vision_model.encoder.stages.{stage}", f"vision.stages.{stage}"
        table += block(f"{theirs}.layers.{{}}", f"{ours}.transformer.blocks", TRANSFORMERS)
        if groups:
            table.append(Rule(f"{theirs}.group_token", f"{ours}.groups", leading(1)))
            table += _assignment(f"{theirs}.downsample", f"{ours}.assign")
        if groups and previous:
            table += norm(f"{theirs}.group_projector.0", f"{ours}.previous_norm")
            table += block(f"{theirs}.group_projector.1", ours, _mlp("previous_mlp", ""))
        previous = groups
    table += norm("vision_model.layernorm", "vision.norm")
    table += [rule for rule in huggingface.CLIP_RULES if rule.theirs.startswith("text_model.")]
    for theirs, tower in _PROJECTIONS.items():
        table += linear(f"{theirs}.0", f"{tower}.projection.up")
        table += linear(f"{theirs}.3", f"{tower}.projection.down")
    return table


def _mlp(ours: str, theirs: str) -> dict[str, str]:
    start = f"{theirs}." if theirs else ""
    return {f"{ours}.up": f"{start}fc1", f"{ours}.down": f"{start}fc2"}


def _assignment(theirs: str, ours: str) -> list[Rule]:
    """Rules of the layer that assigns tokens to segments."""
    mlps = (("mixer", "mlp_inter"), ("mlp", "pre_assign_attn.mlp"), ("segment_mlp", "mlp_channels"))
    names = _ASSIGNMENT | _ATTENTION
    for own, their in mlps:
        names = names | _mlp(own, their)
    return block(theirs, ours, names)


def values_of(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists what `GroupViTModel` does not support.
    """
    vision, text, rule = config.vision, config.text_transformer, tokenizer.config
    assert isinstance(vision, GroupViTConfig)
    segments = [groups or before for before, groups in itertools.pairwise((0, *vision.groups))]
    image = huggingface.tower_values(vision) | {
        "model_type": "groupvit_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "depths": vision.depths,
        "num_group_tokens": vision.groups,
        "num_output_groups": segments,
        "assign_eps": vision.assign_eps,
        "assign_mlp_ratio": [
            vision.group_mlp_dim / vision.width,
            vision.segment_mlp_dim / vision.width,
        ],
    }
    end = 2 if text.pool == "argmax" else text.end_id
    ends = {"bos_token_id": rule.bos_id, "eos_token_id": end, "pad_token_id": rule.pad_id}
    values = parts.model_values(
        "groupvit",
        "GroupViTModel",
        projection_dim=config.embed_dim,
        projection_intermediate_dim=vision.projection_dim,
        vision_config=image,
        text_config=parts.text_values(text, "groupvit") | ends,
    )
    parts.refuse_differences("transformers", config, model_config(values, "config.json"))
    return values


def tensors_of(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """Yield all tensors of a model; the batch norms of the file change nothing."""
    assert isinstance(model.config.vision, GroupViTConfig)
    yield from write(model, rules(model.config))
    ones = np.ones(model.config.vision.projection_dim, np.float32)
    same = {"weight": ones, "bias": 0 * ones, "running_mean": 0 * ones}
    same["running_var"] = ones - np.float32(_NORM_EPS)
    for name in _PROJECTIONS:
        yield from ((f"{name}.1.{part}", value) for part, value in same.items())


def _folded(tensors: Tensors) -> Tensors:
    """Fold the batch norm of each projection into the layer before it."""
    computed: dict[str, Computed] = {}
    used: set[str] = set()
    for name in _PROJECTIONS:
        layer, normed = f"{name}.0", f"{name}.1"
        parts = {f"{normed}.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
        shapes = {tensors.shapes.get(part) for part in (*parts, f"{layer}.bias")}
        if len(shapes) != 1 or None in shapes:
            raise CheckpointError(
                f"{tensors.where} has no {normed} that fits {layer}.bias: download it again"
            )
        computed[f"{layer}.weight"], computed[f"{layer}.bias"] = _fold(tensors, layer, normed)
        used |= parts
    return ComputedTensors(tensors, computed, used)


def _fold(tensors: Tensors, layer: str, normed: str) -> tuple[Computed, Computed]:
    def read(name: str) -> np.ndarray:
        return tensors.read(name).astype(np.float64)

    def scale() -> np.ndarray:
        return read(f"{normed}.weight") / np.sqrt(read(f"{normed}.running_var") + _NORM_EPS)

    def weight(start: int, stop: int | None) -> np.ndarray:
        return (read(f"{layer}.weight") * scale()[:, None]).astype(np.float32)[start:stop]

    def bias(start: int, stop: int | None) -> np.ndarray:
        centred = read(f"{layer}.bias") - read(f"{normed}.running_mean")
        return (centred * scale() + read(f"{normed}.bias")).astype(np.float32)[start:stop]

    shape = tensors.shapes
    return (shape.get(f"{layer}.weight", ()), weight), (shape[f"{layer}.bias"], bias)
