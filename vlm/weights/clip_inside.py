"""CLIP inside a segmenter or a detector of transformers: CLIPSeg (arXiv:2112.10003) and OWL-ViT.

The towers and projections are read (Minderer et al., 2022, arXiv:2205.06230); heads and decoders
are left out. OWLv2 has the same towers, and pads its images.
"""

import dataclasses
from typing import Any

from etils import epath

from vlm.config import ModelConfig, ViTConfig
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import with_defaults
from vlm.weights.rules import Rule

_CLIP = huggingface.DEFAULTS["clip"]
_OWL = {
    "vision": _CLIP["vision"] | {"image_size": 768},
    "text": _CLIP["text"] | {"max_position_embeddings": 16},
    "model": _CLIP["model"],
}
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clipseg": _CLIP,
    "owlvit": _OWL,
    "owlv2": _OWL | {"vision": _OWL["vision"] | {"image_size": 768, "patch_size": 16}},
}
MODEL_TYPES = tuple(DEFAULTS)
# Names of the model inside the larger one, and of what surrounds it.
_INSIDE = {"clipseg": "clip.", "owlvit": "owlvit.", "owlv2": "owlv2."}
_AROUND = ("decoder.", "box_head.", "class_head.", "layer_norm.", "objectness_head.")


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of the dual encoder."""
    family = values["model_type"]
    defaults = DEFAULTS[family]
    # The class around the dual encoder is no obstacle.
    values = {name: value for name, value in values.items() if name != "architectures"}
    vision = huggingface.tower_fields(values, "vision", defaults["vision"], where)
    text = huggingface.tower_fields(values, "text", defaults["text"], where)
    options = huggingface.tower_options(vision, f"{where}: vision_config")
    tower = huggingface.clip_text(text, "clip", f"{where}: text_config")
    if family != "clipseg":  # OWL pools at the highest id
        tower = dataclasses.replace(tower, pool="argmax", end_id=None)
    return ModelConfig(
        ViTConfig(**options, **huggingface.CLIP_VISION, projection="linear"),
        tower,
        embed_dim=with_defaults(values, defaults["model"], where)["projection_dim"],
    )


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder."""
    family, tensors = values["model_type"], weights(folder, *huggingface.WEIGHTS)
    root = _INSIDE[family]
    root = root if any(name.startswith(root) for name in tensors.shapes) else ""
    preprocess = huggingface.preprocess_config(folder, config.vision.image_size)
    checkpoint = huggingface.assemble(
        folder,
        config,
        rules(family, root),
        tensors=tensors,
        preprocess=preprocess,
        ignored=lambda name: (
            name.endswith(".position_ids") or (bool(root) and name.startswith(_AROUND))
        ),
    )
    # CLIPSeg resizes its positions to the images.
    resized = family == "clipseg" and preprocess.image_size != config.vision.image_size
    image_size = preprocess.image_size if resized else None
    return dataclasses.replace(checkpoint, image_size=image_size)


def rules(family: str, root: str) -> list[Rule]:
    """Rules of the dual encoder, whose names start with `root`."""
    owl = family != "clipseg"  # whose authors spell the name of a norm in full
    return [
        dataclasses.replace(
            rule,
            theirs=root + (rule.theirs.replace("layrnorm", "layernorm") if owl else rule.theirs),
        )
        for rule in huggingface.CLIP_RULES
    ]
