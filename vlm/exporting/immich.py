"""ONNX files in the layout of Immich's machine learning service (github.com/immich-app/immich).

`textual/` and `visual/` have a `model.onnx` each; beside them are the tokenizer and preprocessing
settings. The service makes pixels and tokens by its own code, with Pillow and `tokenizers`.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from vlm.bundle import Bundle
from vlm.config import PreprocessConfig
from vlm.errors import ConfigError
from vlm.exporting import onnx_file
from vlm.exporting.programs import ExportProgram
from vlm.weights.sample_texts import sample_texts
from vlm.weights.token_check import compare_rows
from vlm.weights.writing_tokenizer import standalone, tokenizer_files

_LOG = logging.getLogger(__name__)

BFLOAT16, BATCHES = "float32", (1, 2, 8)
USE = ""  # Immich runs the files
_TEXTS = 1_000
# Folder, input and output of each tower in Immich.
_PLACES = {"image": ("visual", "image"), "text": ("textual", "text")}
_OUTPUT = "embedding"


def check(bundle: Bundle, tower: Any, classifier: Any) -> None:
    """Check that Immich can use a model.

    Raises:
        ConfigError: one tower alone, a classifier, or preprocessing that Immich does not have.
    """
    if tower not in (None, "both") or classifier is not None:
        raise ConfigError(
            "Immich searches images by texts, which needs both towers and no classifier: leave out "
            "tower and classifier, or choose format onnx"
        )
    if bundle.config.text.kind == "none" or bundle.config.vision.kind == "none":
        raise ConfigError(f"{bundle.name} has one tower, and Immich needs both: choose format onnx")
    c = bundle.preprocess.config
    if c.resize not in ("squash", "crop") or c.short_side not in (None, c.image_size):
        raise ConfigError(
            f"{bundle.name} prepares images by {c.resize!r} with short_side {c.short_side}, and "
            "Immich by 'squash' or 'crop' at the image size: choose format onnx"
        )
    if bundle.tokenizer.config.pad_side != "right":
        raise ConfigError(f"{bundle.name} pads texts on the left, and Immich on the right")


def write(program: ExportProgram, folder: epath.Path) -> None:
    """Write `visual/model.onnx` or `textual/model.onnx`."""
    place, name = _PLACES[program.name]
    (folder / place).mkdir()
    onnx_file.write_as(program, folder / place, "model", (name, _OUTPUT))


def opened(program: ExportProgram, folder: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Load the file as a function of a batch."""
    import onnxruntime

    place, name = _PLACES[program.name]
    session = onnxruntime.InferenceSession(str(folder / place / "model.onnx"))
    return lambda rows: np.asarray(session.run(None, {name: rows})[0])


def write_settings(folder: epath.Path, bundle: Bundle) -> None:
    """Write the files beside the programs, and log where Immich's inputs differ from the model's.

    Raises:
        CheckpointError: the tokenizer's cleaning has no place in `tokenizer.json`.
    """
    preprocess, rules = bundle.preprocess.config, bundle.tokenizer.config
    about = {
        "embed_dim": bundle.config.embed_dim,
        "vision_cfg": {"image_size": preprocess.image_size},
        "text_cfg": {
            "context_length": rules.context_length,
            "vocab_size": bundle.config.text.vocab_size,
        },
    }
    _dump(folder / "config.json", about)
    _dump(folder / "visual" / "preprocess_cfg.json", preprocess_cfg(preprocess))
    tokenizer_files(folder / "textual", bundle.tokenizer)
    texts = sample_texts(_TEXTS)
    cleaned = [" ".join(text.split()) for text in texts]  # as Immich does first
    rows = np.array([row.ids for row in immich_tokens(bundle).encode_batch(cleaned)])
    found = compare_rows("Immich", texts, bundle.tokenizer(texts), rows)
    if found.differ:
        _LOG.warning("%s", found)
    if preprocess.backend != "pillow":
        _LOG.warning(
            "Immich resizes images with Pillow, and %s with the implementation %r: embeddings of "
            "images differ slightly",
            bundle.name,
            preprocess.backend,
        )


def immich_tokens(bundle: Bundle) -> Any:
    """Return the tokenizer as Immich sets it up: right padding to the context, and truncation."""
    rules, vocabulary = bundle.tokenizer.config, standalone(bundle.tokenizer)
    vocabulary.enable_padding(
        length=rules.context_length,
        pad_token=vocabulary.id_to_token(rules.pad_id),
        pad_id=rules.pad_id,
    )
    vocabulary.enable_truncation(max_length=rules.context_length)
    return vocabulary


def preprocess_cfg(c: PreprocessConfig) -> dict[str, Any]:
    """Return open_clip's form of the preprocessing, which Immich reads."""
    return {
        "size": [c.image_size, c.image_size],
        "mode": "RGB",
        "mean": list(c.mean),
        "std": list(c.std),
        "interpolation": c.kernel,
        "resize_mode": {"crop": "shortest", "squash": "squash"}[c.resize],
        "fill_color": 0,
    }


def _dump(file: epath.Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
