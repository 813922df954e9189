"""Common parts of the writers for other libraries."""

import dataclasses
import json
import logging
from collections.abc import Collection
from typing import Any, Literal, NoReturn

from etils import epath

from vlm.config import ModelConfig, PreprocessConfig, TextConfig, ViTConfig
from vlm.errors import CheckpointError
from vlm.weights.huggingface import tower_values
from vlm.weights.processors import PIL_RESAMPLE

HOLDS = {
    "transformers": (
        "the ViTs of CLIP, SigLIP, Chinese CLIP, AltCLIP, TIPSv2 and AIMv2, ALIGN, GroupViT, "
        "X-CLIP and VideoPrism, and the vision towers of CLIP, SigLIP, ViT, DINOv2, DINOv3, AIMv2 "
        "and InternVL alone"
    ),
    "open_clip": "CLIP's ViTs and ResNets, timm's vision towers, and BERT, XLM-R, RoBERTa and NLLB",
}
SIGMOID = "a logit_bias or the sigmoid loss"
_log = logging.getLogger(__name__)
_RESAMPLE = {name: number for number, name in PIL_RESAMPLE.items()}


def check(
    form: str,
    config: ModelConfig,
    vision: dict[str, Any],
    text: dict[str, Any],
    faults: dict[str, bool] | None = None,
) -> None:
    """Raise an error unless the towers' fields have these values and no fault is true."""
    found = [
        f"{name}.{field} {getattr(tower, field)!r} ({value!r})"
        for name, tower, fields in (
            ("vision", config.vision, vision),
            ("text", config.text_transformer, text),
        )
        for field, value in fields.items()
        if getattr(tower, field) != value
    ]
    refuse_if(form, dict.fromkeys(found, True) | (faults or {}))


def refuse_differences(
    form: str, config: ModelConfig, made: ModelConfig, free: Collection[str] = ()
) -> None:
    """Raise an error if a file that reads as `made` would lose something of `config`.

    The fields that are `free`, such as "vision.layer_scale", may differ. A model of a sigmoid loss
    is refused unless the file has a logit_bias.
    """
    faults = tower_differences("vision", config.vision, made.vision, free)
    faults |= tower_differences("text", config.text, made.text, free)
    sigmoid = config.init_bias is not None or config.loss == "sigmoid"
    faults[SIGMOID] = sigmoid and made.init_bias is None
    refuse_if(form, faults)


def tower_differences(
    name: str, ours: Any, theirs: Any, free: Collection[str] = ()
) -> dict[str, bool]:
    """Return for each field of a tower whether it differs from the tower that a file reads as."""
    # A class token is there in any case if it is pooled.
    tokens = ("class_token",) if getattr(ours, "pool", None) == "class" else ()
    equal = {f"{name}.{field}" for field in ("dropout", "patch_dropout", *tokens)}.union(free)
    faults = {}
    for field in dataclasses.fields(ours):
        value, other = getattr(ours, field.name), getattr(theirs, field.name, None)
        differs = value != other and f"{name}.{field.name}" not in equal
        faults[f"{name}.{field.name} {value!r} ({other!r})"] = differs
    return faults


def refuse_if(form: str, faults: dict[str, bool]) -> None:
    """Raise an error that lists the faults that are true, if any."""
    if found := [fault for fault, present in faults.items() if present]:
        refuse(form, found)


def refuse(form: str, faults: list[str]) -> NoReturn:
    """Raise the CheckpointError that a format does not support the features in `faults`."""
    holds = f" ({form} holds {HOLDS[form]})" if form in HOLDS else ""
    raise CheckpointError(
        f"{form} has no place for {', '.join(faults)}: save the model as a vlm bundle "
        f"instead{holds}"
    )


def warn_of_crop(form: str, c: PreprocessConfig, rounding: Literal["round", "floor"]) -> None:
    """Log that a format's centre crops, with this rounding, are not those of the model."""
    if c.resize == "crop" and c.crop_rounding != rounding:
        _log.warning(
            "%s crops images with an odd margin one pixel beside this model's crop "
            "(preprocess.crop_rounding %s, not %s)",
            form,
            rounding,
            c.crop_rounding,
        )


def dump(path: epath.Path, values: dict[str, Any]) -> None:
    """Write a JSON file in the style of both libraries."""
    path.write_text(json.dumps(values, indent=2) + "\n")


# ------------------------------------------------------------------ settings of transformers


def model_values(family: str, architecture: str, **more: Any) -> dict[str, Any]:
    """Return the fields that every `config.json` has, and `more`."""
    return {
        "architectures": [architecture],
        "model_type": family,
        **more,
    }


def vision_values(c: ViTConfig, family: str, **more: Any) -> dict[str, Any]:
    """Return the `vision_config` of a ViT."""
    return tower_values(c) | {
        "model_type": f"{family}_vision_model",
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        **more,
    }


def text_values(c: TextConfig, family: str, **more: Any) -> dict[str, Any]:
    """Return the `text_config` of a text tower."""
    return tower_values(c) | {
        "model_type": f"{family}_text_model",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context_length,
        "pad_token_id": c.pad_id,
        **more,
    }


def processor_values(c: PreprocessConfig, name: str, **more: Any) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of an image processor that normalises."""
    return {
        "image_processor_type": name,
        "do_resize": True,
        "resample": _RESAMPLE[c.kernel],
        "size": {"height": c.image_size, "width": c.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
        "do_convert_rgb": True,
        **more,
    }
