"""Common parts of the writers for other libraries: the files of a folder, JSON and refusals."""

import json
from collections.abc import Iterable
from typing import Any, NoReturn

from etils import epath

from vlm.config import ModelConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights.files import write_safetensors
from vlm.weights.writing_tokenizer import tokenizer_files


def transformers_folder(
    folder: epath.Path,
    config: dict[str, Any],
    preprocess: dict[str, Any],
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, Any]],
    **more: Any,
) -> None:
    """The files of a folder of transformers; `more` is for its `tokenizer_config.json`."""
    dump(folder / "config.json", config)
    dump(folder / "preprocessor_config.json", preprocess)
    tokenizer_files(folder, tokenizer, **more)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def check(form: str, config: ModelConfig, vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Refuse a model unless the fields of its towers have these values."""
    found = [
        f"{name}.{field} {getattr(tower, field)!r} ({value!r})"
        for name, tower, fields in (("vision", config.vision, vision), ("text", config.text, text))
        for field, value in fields.items()
        if getattr(tower, field) != value
    ]
    if found:
        refuse(form, found)


KERNELS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling
HOLDS = {
    "transformers": "the ViTs of CLIP, SigLIP, Chinese CLIP, AltCLIP and TIPSv2, and ALIGN",
    "open_clip": "CLIP's ViTs and ResNets, timm's vision towers, and XLM-R, RoBERTa and NLLB",
}


def refuse(form: str, found: list[str]) -> NoReturn:
    """Raise the CheckpointError that a format has no place for all of `found`."""
    holds = f" ({form} holds {HOLDS[form]})" if form in HOLDS else ""
    raise CheckpointError(
        f"{form} has no place for {', '.join(found)}: save the model as a vlm bundle instead{holds}"
    )


def dump(path: epath.Path, values: dict[str, Any]) -> None:
    """Write a JSON file as both libraries do."""
    path.write_text(json.dumps(values, indent=2) + "\n")
