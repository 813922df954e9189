"""Folders of transformers: `config.json` names the type of the model, and one module reads each.

A new type is one module, listed in `FAMILIES`, with `MODEL_TYPES`, `model_config(values, where)`
and `open_checkpoint(folder, values, config)`, where `values` are those of `config.json`.
"""

import os
from collections.abc import Collection
from types import ModuleType
from typing import Any

from etils import epath

from vlm.config import ModelConfig
from vlm.weights import (
    aimv2,
    align,
    bert_clip,
    blip,
    blip2,
    clip_inside,
    eva_clip,
    fgclip2,
    flava,
    groupvit,
    huggingface,
    jina_clip,
    nomic,
    one_tower,
    tipsv2,
    videoprism,
    vision_text,
    xclip,
)
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.fields import choice, read_json
from vlm.weights.not_read import refuse_by_name

FAMILIES = (
    huggingface,
    bert_clip,
    tipsv2,
    align,
    fgclip2,
    one_tower,
    vision_text,
    clip_inside,
    blip,
    blip2,
    aimv2,
    flava,
    xclip,
    groupvit,
    videoprism,
    nomic,
    jina_clip,
)
_READERS: dict[str, ModuleType] = {
    name: family for family in FAMILIES for name in family.MODEL_TYPES
}


def recognises(path: epath.Path) -> bool:
    """Whether `path` is a folder of transformers."""
    return (path / "config.json").exists() and is_of_transformers(
        path, {f.name for f in path.iterdir()}
    )


def is_of_transformers(folder: epath.Path, files: Collection[str]) -> bool:
    """Whether `config.json` describes the model; beside open_clip's files it may be a remnant.

    `files` are the names in the folder, or those still to be downloaded into it.
    """
    if "open_clip_config.json" not in files:
        return True
    return read_json(folder / "config.json").get("model_type") in _READERS and any(
        name in files for name in ("model.safetensors", "model.safetensors.index.json")
    )


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """Open the checkpoint in a folder."""
    values, where = read_json(folder / "config.json"), os.fspath(folder / "config.json")
    config = model_config(values, where)
    return _reader(values, where).open_checkpoint(folder, values, config)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of the model that a `config.json` describes.

    Raises:
        CheckpointError: another type of model, an option that vlm does not support, or an invalid
            size.
    """
    refuse_by_name(values, where)
    return _reader(values, where).model_config(values, where)


def _reader(values: dict[str, Any], where: str) -> ModuleType:
    if values.get("architectures") == [eva_clip.ARCHITECTURE]:  # whose model_type is CLIP's
        return eva_clip
    return _READERS[choice(values.get("model_type"), _READERS, f"{where}: model_type")]
