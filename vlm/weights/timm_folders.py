"""timm's own folders: a `config.json` that names an architecture, beside `model.safetensors`.

Plain ViTs are read, without their classifier: the embedding is that of
`timm.create_model(NAME, num_classes=0)`.
"""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

from etils import epath

from vlm.config import PreprocessConfig, ViTConfig
from vlm.errors import CheckpointError, brief
from vlm.weights import huggingface, timm
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weights
from vlm.weights.fields import (
    MAX_PIXELS,
    choice,
    fields,
    integer,
    list_names,
    number,
    read_json,
    string,
)
from vlm.weights.files import Tensors
from vlm.weights.one_tower import vision_checkpoint
from vlm.weights.processors import IMAGENET_MEAN, IMAGENET_STD, open_clip_preprocess

_POOLS = ("token", "avg", "map")
# Arguments of timm's class that the tensors show too, or that change no embedding.
_ARGUMENTS = (
    "img_size", "patch_size", "depth", "mlp_ratio", "global_pool", "num_classes", "in_chans",
    "dynamic_img_size",
)  # fmt: skip

# Preprocessing of timm's `default_cfgs`, by name and tag: tests/peers/test_timm_preprocess.py.
PREPROCESS = Path(__file__).parent / "timm_preprocess.json"


def recognises(path: epath.Path) -> bool:
    """Whether `path` is a folder of timm."""
    file = path / "config.json"
    return file.exists() and describes(read_json(file))


def describes(values: dict[str, Any]) -> bool:
    """Whether a `config.json` is timm's: it names an architecture, and no type of transformers."""
    return isinstance(values.get("architecture"), str) and "model_type" not in values


def check_name(values: dict[str, Any], where: str) -> str:
    """Return the architecture that a `config.json` names.

    Raises:
        CheckpointError: vlm does not read it.
    """
    name = string(values["architecture"], f"{where}: architecture")
    if not timm.PLAIN_VIT.match(name):
        raise CheckpointError(
            f"{where}: architecture is {brief(name)}: alone, vlm reads timm's ViTs of plain blocks "
            "(vit_*, deit_*, deit3_*)"
        )
    return name


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """Open the checkpoint in a folder.

    Raises:
        CheckpointError: another architecture, an option that vlm does not support, or weights of
            another model.
    """
    where = os.fspath(folder / "config.json")
    values = read_json(folder / "config.json")
    name = check_name(values, where)
    arguments = fields(values.get("model_args"), f"{where}: model_args")
    for field, value in arguments.items():
        if field not in _ARGUMENTS:
            raise CheckpointError(
                f"{where}: model_args has {field} {brief(value)}, which vlm does not support"
            )
    pixels = fields(values.get("pretrained_cfg"), f"{where}: pretrained_cfg") or values
    preprocess = _preprocess(pixels, where)
    size = arguments.get("img_size") or preprocess.image_size
    if size not in (preprocess.image_size, [preprocess.image_size] * 2):
        raise CheckpointError(
            f"{where}: model_args.img_size is {brief(size)} and input_size has "
            f"{preprocess.image_size} pixels: they must be equal"
        )
    pool = arguments.get("global_pool") or values.get("global_pool") or ""
    pool = choice(pool, ("", *_POOLS), f"{where}: global_pool")
    tensors = weights(folder, *huggingface.WEIGHTS)
    return _described(folder.name, name, pool, preprocess, tensors, where)


def from_state_dict(path: epath.Path, name: str, tensors: Tensors) -> Checkpoint:
    """Describe a file of weights of timm's ViT `name`, with timm's preprocessing for that name.

    Raises:
        CheckpointError: weights of another model, or a name whose preprocessing depends on the tag.
    """
    where = f"{path} as {name}"
    table = tensors.shapes.get("pos_embed", ())
    if len(table) != 3:
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}")
    tower = timm.named_tower(name)
    # The table may have the class token and the registers, or the patches alone.
    side = max(1, math.isqrt(table[1])) * tower.patch_size
    pixels = named_preprocess(name, where)
    preprocess = _preprocess(pixels | {"input_size": [3, side, side]}, where)
    return _described(path.stem, name, "", preprocess, tensors, where)


@functools.cache
def preprocess_table() -> dict[str, Any]:
    """Return the different `settings`, and the number of those of each tag by `names`."""
    return json.loads(PREPROCESS.read_text())


def named_preprocess(name: str, where: str) -> dict[str, Any]:
    """Return the fields of timm's `pretrained_cfg` of a NAME or NAME.TAG.

    Raises:
        CheckpointError: an unknown name or tag, or a name whose tags differ.
    """
    table, (base, _, tag) = preprocess_table(), name.partition(".")
    tags = table["names"].get(base)
    if tags is None:
        raise CheckpointError(
            f"{where}: vlm has no preprocessing of timm's {base}: load the folder with its "
            "config.json instead"
        )
    if tag and tag not in tags:
        raise CheckpointError(
            f"{where}: {base} has no tag {brief(tag)}: choose {list_names(list(tags))}"
        )
    numbers = {tags[tag]} if tag else set(tags.values())
    if len(numbers) > 1:
        choices = list_names([f"{base}.{tag}" for tag in tags])
        raise CheckpointError(
            f"{where}: timm preprocesses images of {base} by the tag of its weights: give "
            f"architecture {choices}"
        )
    crop, mean, std, mode = table["settings"][numbers.pop()]
    return {"crop_pct": crop, "mean": mean, "std": std, "crop_mode": mode}


def _described(
    title: str, name: str, pool: str, preprocess: PreprocessConfig, tensors: Tensors, where: str
) -> Checkpoint:
    """Describe a tower `name` whose tensors have timm's own names.

    Raises:
        CheckpointError: weights of another model.
    """
    tensors = timm.with_biases(_in_trunk(tensors))
    try:
        vision = timm.vision_config(name, preprocess.image_size, pool, "none", tensors.shapes)
        if vision.width != timm.named_tower(name).width:  # then the heads would be of another one
            raise ValueError(f"width {vision.width}")
    except (KeyError, ValueError, IndexError):
        raise CheckpointError(f"{where}: the weights are not those of timm's {name}") from None
    assert isinstance(vision, ViTConfig)
    return vision_checkpoint(
        title,
        vision,
        vision.width,
        preprocess,
        tensors,
        timm.rules(vision, shapes=tensors.shapes),
        positions="bicubic_antialias",
    )


def _in_trunk(tensors: Tensors) -> Tensors:
    """Give the tensors the names of a tower inside open_clip; leave the classifier out."""
    kept = [name for name in tensors.shapes if not name.startswith(("head.", "head_dist."))]
    computed = {
        f"{timm.TRUNK}.{name}": (
            tensors.shapes[name],
            lambda start, stop, name=name: tensors.read(name, start, stop),
        )
        for name in kept
    }
    return ComputedTensors(tensors, computed, tensors.shapes.keys())


def _preprocess(c: dict[str, Any], where: str) -> PreprocessConfig:
    """Preprocessing of a `pretrained_cfg`, as timm's transforms for evaluation make it."""
    size = c.get("input_size", [3, 224, 224])
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise CheckpointError(
            f"{where}: input_size is {brief(size)}: vlm supports square RGB images, [3, n, n]"
        )
    side = integer(size[1], f"{where}: input_size", high=MAX_PIXELS)
    mode = choice(c.get("crop_mode") or "center", ("center", "squash"), f"{where}: crop_mode")
    ratio = number(c.get("crop_pct") or 0.875, f"{where}: crop_pct", above=0.0)
    settings = {
        "mean": c.get("mean") or IMAGENET_MEAN,
        "std": c.get("std") or IMAGENET_STD,
        "interpolation": c.get("interpolation") or "bicubic",
        "resize_mode": "squash" if mode == "squash" else "shortest",
    }
    if ratio > 1:
        raise CheckpointError(f"{where}: crop_pct is {ratio}: vlm does not pad to a crop")
    short = math.floor(side / ratio)
    config = open_clip_preprocess(settings, side, where)
    return dataclasses.replace(config, short_side=None if short == side else short)
