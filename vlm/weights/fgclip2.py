"""FG-CLIP 2 (arXiv:2510.10921): SigLIP 2 NaFlex, with positions and a head for long texts.

Texts no longer than SigLIP 2's are embedded as there. Longer ones take the first `keep_len`
positions of one table, the others of a second, and another head. The heads for regions of an image
and for their captions are not loaded.

The authors resize an image to between 128 and 1,024 patches, depending on its size, and always to
1,024 in their ImageNet evaluation. `vlm.load(MODEL, image_size=512)` does the latter; the published
files have 256.
"""

import dataclasses
import os
from typing import Any

import numpy as np
from etils import epath

from vlm.config import ModelConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, ComputedTensors
from vlm.weights.files import Tensors, read_parameter
from vlm.weights.layers import linear
from vlm.weights.rules import Rule

MODEL_TYPES = ("fgclip2",)
_LONG = {"keep_len": 20, "longtext_len": 196}  # defaults of its configuration class


def open_checkpoint(folder: epath.Path, values: dict[str, Any], config: ModelConfig) -> Checkpoint:
    """Open the checkpoint in a folder; its `longer` is the same model for long texts."""
    short = huggingface.assemble(folder, config, RULES, ignored=_OPTIONAL.__contains__)
    # The authors make each text lower-case, including special tokens that are spelled out in it.
    lower = dataclasses.replace(short.tokenizer.config, lowercase=True)
    short = dataclasses.replace(short, tokenizer=short.tokenizer.with_rules(lower))
    long = huggingface.tower_fields(values, "text", _LONG, os.fspath(folder / "config.json"))
    length, width = long["longtext_len"], config.text.width
    text = dataclasses.replace(config.text, context_length=length)
    longer = dataclasses.replace(
        short,
        config=dataclasses.replace(config, text=text),
        tokenizer=short.tokenizer.with_rules(dataclasses.replace(lower, context_length=length)),
        tensors=_join_positions(short.tensors, long["keep_len"], (length, width)),
        rules=LONG_RULES,
    )
    return dataclasses.replace(short, longer=longer)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Configuration of the model for short texts."""
    config = huggingface.model_config(values | {"model_type": "siglip2"}, where)
    place, text = f"{where}: text_config", config.text
    if config.embed_dim != text.width:
        raise CheckpointError(
            f"{place}.projection_size is {config.embed_dim} and its heads for other texts make "
            f"hidden_size, {text.width}: they must be equal"
        )
    length = huggingface.tower_fields(values, "text", _LONG, where)["longtext_len"]
    if length <= text.context_length:
        raise CheckpointError(
            f"{place}.longtext_len is {length}, and short texts have {text.context_length} tokens "
            "already: it must be more"
        )
    return config


_TABLES = "text_model.embeddings"
_SHORT_POSITIONS = f"{_TABLES}.position_embedding.weight"
_FIRST, _OTHERS = (f"{_TABLES}.position_embedding_{end}.weight" for end in ("ori", "res"))
_LONG_POSITIONS = f"{_FIRST} and {_OTHERS}"


def _join_positions(tensors: Tensors, keep: int, shape: tuple[int, int]) -> ComputedTensors:
    """Join the two tables of positions for long texts: `keep` rows of the first, then the second.

    Both must have this `shape`.
    """

    def rows(start: int, stop: int | None) -> np.ndarray:
        stop = shape[0] if stop is None else stop
        middle = min(max(keep, start), stop)
        first = read_parameter(tensors, _FIRST, start, middle)
        return np.concatenate([first, read_parameter(tensors, _OTHERS, middle, stop)])

    tables = [tensors.shapes.get(name) for name in (_FIRST, _OTHERS)]
    found = next((t for t in tables if t is not None and tuple(t) != shape), shape)
    computed = {} if None in tables else {_LONG_POSITIONS: (tuple(found), rows)}
    return ComputedTensors(tensors, computed, {_FIRST, _OTHERS})


RULES = huggingface.SIGLIP2_RULES
_OF_LENGTH = ("text.position", "text.projection.kernel", "text.projection.bias")
LONG_RULES = [
    *(rule for rule in RULES if rule.ours not in _OF_LENGTH),
    Rule(_LONG_POSITIONS, "text.position"),
    *linear("longtext_head", "text.projection"),
]

# Parameters that the short or the long text mode leaves unused.
_OPTIONAL = {
    _SHORT_POSITIONS,
    _FIRST,
    _OTHERS,
    "dense_feature_head.probe",
    *(
        f"{layer}{part}"
        for layer in (
            "text_model.head.", "longtext_head.", "boxtext_head.",
            "dense_feature_head.attention.in_proj_", "dense_feature_head.attention.out_proj.",
            "dense_feature_head.layernorm.", "dense_feature_head.mlp.fc1.",
            "dense_feature_head.mlp.fc2.",
        )
        for part in ("weight", "bias")
    ),
}  # fmt: skip
