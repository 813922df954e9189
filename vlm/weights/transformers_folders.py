"""Folders of transformers: a `config.json` names the kind of model, and a module reads each kind.

A new kind is one module with `MODEL_TYPES`, `model_config` and `open_checkpoint`, and its name in
`FAMILIES`.
"""

import os
from collections.abc import Collection
from types import ModuleType
from typing import Any

from etils import epath

from vlm.config import ModelConfig
from vlm.errors import CheckpointError
from vlm.weights import align, bert_clip, fgclip2, huggingface, tipsv2
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.fields import read_json, show

FAMILIES = (huggingface, bert_clip, tipsv2, align, fgclip2)
_READERS: dict[str, ModuleType] = {
    name: family for family in FAMILIES for name in family.MODEL_TYPES
}


def recognises(path: epath.Path) -> bool:
    """Whether `path` is a folder of transformers."""
    return (path / "config.json").exists() and is_of_transformers(
        path, {f.name for f in path.iterdir()}
    )


def is_of_transformers(folder: epath.Path, files: Collection[str]) -> bool:
    """Whether `config.json` is that of the model; beside open_clip's files it may be a remnant.

    `files` are the names in the folder, or of what is still to come into it.
    """
    if "open_clip_config.json" not in files:
        return True
    return read_json(folder / "config.json").get("model_type") in _READERS and any(
        name in files for name in ("model.safetensors", "model.safetensors.index.json")
    )


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: another kind of model, or one that is incomplete, torn or contradictory.
    """
    file = folder / "config.json"
    return _reader(read_json(file), os.fspath(file)).open_checkpoint(folder)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our configuration of a `config.json`.

    Raises:
        CheckpointError: another kind of model, an option that vlm does not know, or a size that
            cannot be.
    """
    return _reader(values, where).model_config(values, where)


def _reader(values: dict[str, Any], where: str) -> ModuleType:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise CheckpointError(
            f"{where} describes a model of type {show(kind)}: vlm reads {', '.join(_READERS)}"
        )
    return _READERS[kind]
