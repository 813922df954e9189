"""transformers' `VideoPrismClipModel`: VideoPrism-LvT (Zhao et al., 2024, arXiv:2402.13217).

The class has no temperature: the logits are the cosines. Its norms store their scale minus one.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, VideoPrismConfig
from vlm.errors import CheckpointError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import huggingface
from vlm.weights import writing_parts as parts
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import choice, fields, read_json
from vlm.weights.layers import block, linear
from vlm.weights.one_tower import SCALE, with_scale
from vlm.weights.processors import huggingface_preprocess
from vlm.weights.rules import SAME, Rule, Transform, leading, write
from vlm.weights.vocabularies import huggingface_tokenizer

MODEL_TYPES = ("videoprism",)
_COMMON = {
    "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "layer_norm_eps": 1e-6, "attn_logit_softcapping": 50.0, "qkv_bias": True, "apply_l2norm": True,
}  # fmt: skip
# Sizes of the vision tower: theirs, ours and the default.
_VISION = {
    "num_frames": ("frames", 16),
    "image_size": ("image_size", 288),
    "num_spatial_layers": ("depth", 12),
    "num_temporal_layers": ("time_depth", 4),
    "num_auxiliary_layers": ("joint_depth", 2),
}
_TEXT = _COMMON | {
    "num_hidden_layers": 12, "vocab_size": 32000, "max_position_embeddings": 64,
    "hidden_act": "relu", "pad_token_id": 0,
}  # fmt: skip
_SIZES = {
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "layer_norm_eps": "norm_eps",
    "attn_logit_softcapping": "softcap",
}
_POSITIONS = "text_model.embeddings.position_embedding"
# Settings of a video processor that change no pixels of the sampled frames.
_OF_VIDEOS = (
    "video_processor_type", "do_sample_frames", "num_frames", "return_metadata", "processor_class"
)  # fmt: skip
_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of a model of this family.

    Raises:
        CheckpointError: another class of VideoPrism, or a setting of no published model.
    """
    classes, purpose = ["VideoPrismClipModel"], "to embed videos and texts"
    values = huggingface.without_class(values, classes, "VideoPrism", where, purpose)
    given = _COMMON | {name: default for name, (_, default) in _VISION.items()}
    given |= {"hidden_act": "gelu_python", "tubelet_size": None}
    vision = huggingface.tower_fields(values, "vision", given, where)
    text = huggingface.tower_fields(values, "text", _TEXT, where)
    at = {"vision": f"{where}: vision_config", "text": f"{where}: text_config"}
    choice(vision["hidden_act"], ("gelu_python", "gelu"), f"{at['vision']}.hidden_act")
    choice(text["hidden_act"], ("relu",), f"{at['text']}.hidden_act")
    for name, tower in (("vision", vision), ("text", text)):
        for setting in ("qkv_bias", "apply_l2norm"):
            choice(tower[setting], (True,), f"{at[name]}.{setting}")
    tubelet = vision["tubelet_size"] or [1, 18, 18]
    if not isinstance(tubelet, list) or len(tubelet) != 3 or tubelet[0] != 1:
        raise CheckpointError(
            f"{at['vision']}.tubelet_size is {brief(tubelet)}: vlm supports [1, SIZE, SIZE]"
        )
    choice(tubelet[1], (tubelet[2],), f"{at['vision']}.tubelet_size")
    sizes = [{ours: tower[theirs] for theirs, ours in _SIZES.items()} for tower in (vision, text)]
    return ModelConfig(
        VideoPrismConfig(
            **sizes[0],
            **{ours: vision[theirs] for theirs, (ours, _) in _VISION.items()},
            patch_size=tubelet[1],
        ),
        TextConfig(
            **sizes[1],
            depth=text["num_hidden_layers"],
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"],
            pad_id=text["pad_token_id"],
            activation="relu",
            causal=True,
            pool="appended",
            scale_embedding=True,
            projection="none",
        ),
        embed_dim=vision["hidden_size"],
        init_scale=1.0,
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or does not fit, or an option that vlm does not support.
    """
    return huggingface.assemble(
        folder,
        config,
        rules(),
        tensors=with_scale(weights(folder, *huggingface.WEIGHTS), config),
        tokenizer=_tokenizer(folder, config),
        preprocess=_preprocess(folder, config.vision.image_size),
    )


def _tokenizer(folder: epath.Path, config: ModelConfig) -> Tokenizer:
    """Read T5's tokenizer without its extra tokens, which have no row in the embedding table."""
    read = huggingface_tokenizer(folder, config)
    values, size = json.loads(read.vocabulary.to_str()), config.text.vocab_size
    values["added_tokens"] = [
        token
        for token in values["added_tokens"]
        if token["id"] < size or not token["content"].startswith("<extra_id_")
    ]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)), read.config)


def _preprocess(folder: epath.Path, image_size: int) -> PreprocessConfig:
    """Read the video processor, which resizes tensors to a square.

    Raises:
        CheckpointError: there is none, or it has a setting that vlm does not support.
    """
    path = folder / "processor_config.json"
    values = read_json(path).get("video_processor") if path.exists() else None
    where = f"{path}: video_processor"
    if not values:
        path = next((folder / name for name in _FILES if (folder / name).exists()), None)
        if path is None:
            raise CheckpointError(
                f"{folder} has no {_FILES[0]}: save or download the processor beside the model"
            )
        values, where = read_json(path), os.fspath(path)
    values = fields(values, where)
    kind = values.get("video_processor_type", "LlavaOnevisionVideoProcessor")
    supported = ("LlavaOnevisionVideoProcessor", "VideoPrismVideoProcessor")
    choice(kind, supported, f"{where}: video_processor_type")
    if values.get("fps") is not None:
        raise CheckpointError(f"{where}: fps is {brief(values['fps'])}: vlm samples num_frames")
    same = {name: value for name, value in values.items() if name not in _OF_VIDEOS}
    # The processor of SigLIP has the same steps.
    return huggingface_preprocess(
        {"do_normalize": False, **same, "image_processor_type": "SiglipImageProcessorFast"},
        where,
        image_size,
    )


_PLUS_ONE = Transform(lambda s: s, lambda x, s: x.astype(np.float32) + 1, lambda x: x - 1)
_STEM = Transform(  # torch's (out, in, 1, height, width)
    lambda s: (s[3], s[2], 1, s[0], s[1]),
    lambda x, s: x[:, :, 0].transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1)[:, :, None],
)
_LAYERS = {
    "attention.query": "attention.q_proj", "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj", "attention.out": "attention.o_proj",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}  # fmt: skip


def rules() -> list[Rule]:
    """Rules of a model."""
    inner, head = "video_model.vision_model", "video_model.head"
    pool = {name.removeprefix("attention."): theirs.removeprefix("attention.")
            for name, theirs in _LAYERS.items() if "mlp" not in name}  # fmt: skip
    return [
        SCALE,
        *linear(f"{inner}.spatial_embeddings.patch_embeddings.projection", "vision.stem",
                kernel=_STEM),
        Rule(f"{inner}.spatial_embeddings.position_embeddings", "vision.position", leading(1)),
        Rule(f"{inner}.temporal_embeddings.position_embeddings", "vision.time_position",
             leading(1)),
        *_blocks(f"{inner}.spatial_layers", "vision.transformer"),
        *_norm(f"{inner}.layernorm1", "vision.norm"),
        *_blocks(f"{inner}.temporal_layers", "vision.time_transformer"),
        *_norm(f"{inner}.layernorm2", "vision.time_norm"),
        *_blocks("video_model.auxiliary_layers", "vision.joint_transformer"),
        Rule(f"{head}.per_dim_scale", "vision.pool.scale"),
        Rule(f"{head}.pooling_attention_query", "vision.pool.probe", leading(2)),
        *block(head, "vision.pool", pool),
        *_norm("video_model.head_layernorm", "vision.pool_norm"),
        Rule("text_model.embeddings.token_embedding.weight", "text.embedding"),
        Rule(_POSITIONS, "text.position"),
        Rule("text_model.embeddings.cls_emb", "text.class_token", leading(2)),
        *_blocks("text_model.layers", "text.transformer"),
        *_norm("text_model.layernorm", "text.norm"),
    ]  # fmt: skip


def _blocks(theirs: str, ours: str) -> list[Rule]:
    layer, blocks = f"{theirs}.{{}}", f"{ours}.blocks"
    return [
        *block(layer, blocks, _LAYERS),
        *_norm(f"{layer}.layernorm_before", f"{blocks}.attention_norm"),
        *_norm(f"{layer}.layernorm_after", f"{blocks}.mlp_norm"),
    ]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}.scale", _PLUS_ONE),
        Rule(f"{theirs}.bias", f"{ours}.bias", SAME),
    ]


def values_of(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: lists what `VideoPrismClipModel` does not support.
    """
    vision, text = config.vision, config.text_transformer
    assert isinstance(vision, VideoPrismConfig)
    towers = [
        {theirs: getattr(tower, ours) for theirs, ours in _SIZES.items()}
        for tower in (vision, text)
    ]
    values = parts.model_values(
        "videoprism",
        "VideoPrismClipModel",
        vision_config=towers[0]
        | {theirs: getattr(vision, ours) for theirs, (ours, _) in _VISION.items()}
        | {
            "model_type": "videoprism_vision_model",
            "tubelet_size": [1, vision.patch_size, vision.patch_size],
        },
        text_config=towers[1]
        | {
            "model_type": "videoprism_text_model",
            "num_hidden_layers": text.depth,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "pad_token_id": text.pad_id,
        },
    )
    parts.refuse_differences("transformers", config, model_config(values, "config.json"))
    return values


def tensors_of(model: DualEncoder) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of the class, which has no scale of logits and stores positions."""
    yield from write(
        model, [rule for rule in rules() if rule is not SCALE], computed=[SCALE.theirs]
    )
    length = model.config.text.context_length
    yield "text_model.embeddings.position_ids", np.arange(length)[None]


def processor_of(c: PreprocessConfig, frames: int) -> dict[str, Any]:
    """Return the `video_preprocessor_config.json`."""
    faults = {
        "preprocessing that does not squash frames": c.resize != "squash",
        "resizing of frames by Pillow": c.backend != "tensor",
    }
    parts.refuse_if("transformers", faults)
    values = parts.processor_values(c, "", do_sample_frames=True, num_frames=frames)
    del values["image_processor_type"]
    plain = c.mean == (0.0,) * 3 and c.std == (1.0,) * 3
    return values | {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "do_normalize": not plain,
    }
