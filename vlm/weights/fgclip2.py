"""FG-CLIP 2 (arXiv:2510.10921): SigLIP 2 NaFlex, with positions and a head for long texts.

Texts no longer than SigLIP 2's are embedded as there. Longer ones take the first `keep_len`
positions of one table, the others of a second, and another head. The heads for regions of an image
and for their captions are not loaded.

Its authors give an image from 128 to 1,024 patches by its size, and each 1,024 in their ImageNet
evaluation, which is what `vlm.load(MODEL, image_size=512)` does; the published files say 256.
"""

import dataclasses
import os
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.config import ModelConfig
from vlm.errors import CheckpointError
from vlm.weights import huggingface
from vlm.weights.checkpoint import Checkpoint, weights
from vlm.weights.fields import read_json
from vlm.weights.files import Tensors, read_parameter
from vlm.weights.layers import linear
from vlm.weights.rules import Rule
from vlm.weights.vocabularies import check_vocabulary, huggingface_tokenizer

MODEL_TYPES = ("fgclip2",)
_LONG = {"keep_len": 20, "longtext_len": 196}  # defaults of its configuration class


def open_checkpoint(folder: epath.Path) -> Checkpoint:
    """The checkpoint in a folder, whose `longer` is the same model for long texts.

    Raises:
        CheckpointError: it is incomplete, torn or contradictory.
    """
    values, where = read_json(folder / "config.json"), os.fspath(folder / "config.json")
    config = model_config(values, where)
    tokenizer = huggingface_tokenizer(folder, config)
    check_vocabulary(tokenizer, config, folder)
    # Its authors make each text lower-case, special tokens that are spelled out in it included.
    lower = dataclasses.replace(tokenizer.config, lowercase=True)
    short = Checkpoint(
        folder.name,
        config,
        huggingface.preprocess_config(folder, config.vision.image_size),
        tokenizer.with_rules(lower),
        weights(folder, *huggingface.WEIGHTS),
        RULES,
        _ALL.__contains__,
        "bicubic",
    )
    long = huggingface.tower_fields(values, "text", _LONG, where)
    length, width = long["longtext_len"], config.text.width
    text = dataclasses.replace(config.text, context_length=length)
    longer = dataclasses.replace(
        short,
        config=dataclasses.replace(config, text=text),
        tokenizer=tokenizer.with_rules(dataclasses.replace(lower, context_length=length)),
        tensors=WithLongPositions(short.tensors, long["keep_len"], (length, width)),
        rules=LONG_RULES,
    )
    return dataclasses.replace(short, longer=longer)


def model_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our configuration of a `config.json` of this model, for short texts.

    Raises:
        CheckpointError: an option that vlm does not know, or a size that cannot be.
    """
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


class WithLongPositions:
    """Tensors with one table of positions for long texts in place of the two that it is made of.

    `keep` rows are of the first, and the others of the second; `shape` is what each should have.
    """

    def __init__(self, tensors: Tensors, keep: int, shape: tuple[int, int]):
        self.where = tensors.where
        self._tensors, self._keep, self._length = tensors, keep, shape[0]
        self.shapes = dict(tensors.shapes)
        tables = [self.shapes.pop(name, None) for name in (_FIRST, _OTHERS)]
        if None not in tables:
            wrong = [table for table in tables if table is not None and tuple(table) != shape]
            self.shapes[_LONG_POSITIONS] = wrong[0] if wrong else shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        if name != _LONG_POSITIONS:
            return self._tensors.read(name, start, stop)
        stop = self._length if stop is None else stop
        middle = min(max(self._keep, start), stop)
        first = read_parameter(self._tensors, _FIRST, start, middle)
        return np.concatenate([first, read_parameter(self._tensors, _OTHERS, middle, stop)])


# --------------------------------------------------------------------- their names and ours

RULES = huggingface.SIGLIP2_RULES
_OF_LENGTH = ("text.position", "text.projection.kernel", "text.projection.bias")
LONG_RULES = [
    *(rule for rule in RULES if rule.ours not in _OF_LENGTH),
    Rule(_LONG_POSITIONS, "text.position"),
    *linear("longtext_head", "text.projection"),
]


def _with_bias(*layers: str) -> list[str]:
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


# What a file has and one way of reading texts or the other leaves: no name but these.
_DENSE = "dense_feature_head"
_ALL = {
    _SHORT_POSITIONS,
    _FIRST,
    _OTHERS,
    f"{_DENSE}.probe",
    f"{_DENSE}.attention.in_proj_weight",
    f"{_DENSE}.attention.in_proj_bias",
    *_with_bias("text_model.head", "longtext_head", "boxtext_head"),
    *_with_bias(*(f"{_DENSE}.{part}" for part in ("attention.out_proj", "layernorm"))),
    *_with_bias(f"{_DENSE}.mlp.fc1", f"{_DENSE}.mlp.fc2"),
}
