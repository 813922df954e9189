"""A public checkpoint in a folder or file: which family it is, and what it holds."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from vlm.config import FastViTConfig, ModelConfig, PreprocessConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights import big_vision, fastvit, huggingface, open_clip, openai
from vlm.weights.files import SafetensorsFiles, Shards, Tensors
from vlm.weights.processors import huggingface_preprocess, open_clip_preprocess
from vlm.weights.resolution import Positions, TextPositions
from vlm.weights.rules import Rule
from vlm.weights.torch_pickle import TorchFile
from vlm.weights.vocabularies import (
    bert_tokenizer,
    big_vision_tokenizer,
    check_vocabulary,
    clip_tokenizer,
    huggingface_tokenizer,
    open_clip_tokenizer,
)

BUNDLE_FILE = "bundle.json"  # of a folder in our own format
# The names of a folder's weights without their ending, best first.
HUGGINGFACE_WEIGHTS = ("model", "pytorch_model")
OPEN_CLIP_WEIGHTS = ("open_clip_model", "open_clip_pytorch_model")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about itself; its tensors are not read yet."""

    name: str
    config: ModelConfig
    preprocess: PreprocessConfig
    tokenizer: Tokenizer
    tensors: Tensors
    rules: Sequence[Rule]
    ignored: Callable[[str], bool]
    positions: Positions  # how the family resizes its position embeddings: of images ...
    text_positions: TextPositions = "cut"  # ... and of texts
    context_length: int | None = None  # that it is used with, where it has positions for more
    fingerprint: str | None = None  # of the parameters, where they carry one


def open_checkpoint(path: epath.Path) -> Checkpoint | None:
    """The checkpoint in a folder or file, or None where none is recognised.

    Raises:
        CheckpointError: it is of a known format, but incomplete, torn or contradictory.
    """
    if path.is_file():
        if path.suffix in (".pt", ".pth"):
            return _open_openai(path)
        if path.suffix == ".npz":
            return _open_big_vision(path)
        return None
    if (path / "config.json").exists() and is_huggingface(path, {f.name for f in path.iterdir()}):
        return _open_huggingface(path)
    if (path / "open_clip_config.json").exists():
        return _open_open_clip(path)
    return None


def _open_huggingface(folder: epath.Path) -> Checkpoint:
    values = read_json(folder / "config.json")
    config = huggingface.model_config(values, os.fspath(folder / "config.json"))
    family = values["model_type"]
    tokenizer = huggingface_tokenizer(folder, config)
    check_vocabulary(tokenizer, config, folder)
    return Checkpoint(
        folder.name,
        config,
        _huggingface_preprocess(folder, config.vision.image_size),
        tokenizer,
        weights(folder, *HUGGINGFACE_WEIGHTS),
        huggingface.RULES[family],
        huggingface.ignored,
        "bicubic",
    )


def is_huggingface(folder: epath.Path, files: Collection[str]) -> bool:
    """Whether `config.json` is that of the model; beside open_clip's files it may be a remnant.

    `files` are the names in the folder, or of what is still to come into it.
    """
    if "open_clip_config.json" not in files:
        return True
    return read_json(folder / "config.json").get("model_type") in huggingface.FAMILIES and any(
        name in files for name in ("model.safetensors", "model.safetensors.index.json")
    )


def _open_open_clip(folder: epath.Path) -> Checkpoint:
    where = os.fspath(folder / "open_clip_config.json")
    values = read_json(folder / "open_clip_config.json")
    model = values.get("model_cfg")
    if not isinstance(model, dict):
        raise CheckpointError(f"{where} has no model_cfg: download it again")
    tensors = weights(folder, *OPEN_CLIP_WEIGHTS)
    config = open_clip.model_config(model, tensors.shapes, where)
    if isinstance(config.vision, FastViTConfig):
        tensors = fastvit.Fused(tensors, config.vision, model["vision_cfg"]["timm_model_name"])
    tokenizer = open_clip_tokenizer(folder, model["text_cfg"], config)
    check_vocabulary(tokenizer, config, folder)
    image_size = config.vision.image_size
    return Checkpoint(
        folder.name,
        config,
        open_clip_preprocess(values.get("preprocess_cfg") or {}, image_size, where),
        tokenizer,
        tensors,
        open_clip.rules(config, tensors.shapes),
        open_clip.ignored,
        "bicubic_antialias",
        "linear",
    )


def _open_openai(path: epath.Path) -> Checkpoint:
    where = os.fspath(path)
    tensors = TorchFile(path)
    if not tensors.is_script and "input_resolution" not in tensors.shapes:
        # open_clip's training files have the same names and another activation: never guess.
        raise CheckpointError(
            f"{where} does not say what model it is of: put it as open_clip_pytorch_model.bin into "
            "a folder with its open_clip_config.json, and load the folder"
        )
    config = openai.model_config(tensors.shapes, where)
    tokenizer = clip_tokenizer(config.text.context_length)
    check_vocabulary(tokenizer, config, where)
    return Checkpoint(
        path.stem,
        config,
        openai.preprocess_config(config.vision.image_size),
        tokenizer,
        tensors,
        open_clip.rules(config, tensors.shapes),
        openai.ignored,
        "bicubic_antialias",
        "linear",
    )


def _open_big_vision(path: epath.Path) -> Checkpoint:
    tensors = big_vision.NpzFile(path)
    config = big_vision.model_config(tensors.shapes, os.fspath(path))
    if config.text.norm == "post":
        tokenizer = bert_tokenizer(path, config)
    else:
        tokenizer = big_vision_tokenizer(path.parent, config)
    check_vocabulary(tokenizer, config, path)
    return Checkpoint(
        path.stem,
        config,
        big_vision.preprocess_config(config.vision.image_size),
        tokenizer,
        tensors,
        big_vision.rules(config),
        big_vision.ignored,
        "zoom",
        context_length=tokenizer.config.context_length,
    )


def _huggingface_preprocess(folder: epath.Path, image_size: int) -> PreprocessConfig:
    """From `preprocessor_config.json`, or the part of `processor_config.json` that holds it."""
    path = folder / "preprocessor_config.json"
    if path.exists():
        return huggingface_preprocess(read_json(path), os.fspath(path), image_size)
    path = folder / "processor_config.json"
    if path.exists() and (values := read_json(path).get("image_processor")):
        return huggingface_preprocess(values, os.fspath(path), image_size)
    raise CheckpointError(
        f"{folder} has no preprocessor_config.json: save or download the processor beside the model"
    )


def weights(folder: epath.Path, *stems: str) -> Tensors:
    """The tensors of `STEM.safetensors` or `STEM.bin`, whole or in the shards that an index lists.

    Raises:
        CheckpointError: none of them is there, or a shard is missing.
    """
    for name in weight_names(*stems):
        file = folder / name
        if not file.exists():
            continue
        files = shards(file) if name.endswith(".index.json") else [file]
        if ".safetensors" in name:
            return SafetensorsFiles(files)
        return Shards([TorchFile(file) for file in files])
    wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
    raise CheckpointError(f"{folder} has no {wanted}: the download is incomplete")


def weight_names(*stems: str) -> Iterator[str]:
    """What a folder's weights may be called, best first: whole, or the index of their shards."""
    for ending in ("safetensors", "bin"):
        for stem in stems:
            yield f"{stem}.{ending}"
            yield f"{stem}.{ending}.index.json"


def shards(index: epath.Path) -> list[epath.Path]:
    """The files that an index lists, in their order."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (KeyError, AttributeError, TypeError):
        files = []
    if not files:
        raise CheckpointError(f"{index} lists no shards: download it again")
    return files


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is missing, torn, or holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no object of fields: download it again")
    return values
