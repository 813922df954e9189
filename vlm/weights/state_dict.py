"""State dicts without a config: files of open_clip's trainer, timm's and vlm's parameters, by name.

Names are open_clip's (`ViT-B-32`), timm's of plain ViTs (`vit_base_patch16_224.mae`, a vision tower
alone), and those of `vlm.models.recipes` (`clip-B/16`, with vlm's names of parameters). dino.txt is
a folder of two files (`weights/dinotxt.py`).
`open_clip_architectures.json` has the model_cfg of every image-text architecture of open_clip's
main branch, one on each line; open_clip's MIT licence holds for it. Preprocessing is the default of
that library (of timm, that of the name and its tag), and the log tells it.
"""

import dataclasses
import difflib
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vlm.errors import CheckpointError, ConfigError
from vlm.inputs.tokenizer import VOCABULARY_FILE, Tokenizer
from vlm.models import recipes, variants
from vlm.weights import dinotxt, open_clip, timm, timm_folders
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.files import SafetensorsFile, Tensors
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import Rule, flat_shapes
from vlm.weights.torch_pickle import TorchFile
from vlm.weights.vocabularies import clip_tokenizer

_LOG = logging.getLogger(__name__)
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@functools.cache
def architectures() -> dict[str, dict[str, Any]]:
    """The `model_cfg` of each architecture, by open_clip's name."""
    return json.loads((Path(__file__).parent / "open_clip_architectures.json").read_text())


RECIPES = tuple(
    f"{family}-{size}"
    for family, sizes in (("clip", variants.CLIP_TEXT), ("siglip", variants.SIGLIP_TEXT))
    for size in variants.NAMES
    if size.split("/")[0] in sizes
)


def find_architecture(name: str) -> str:
    """Return the full name of an architecture; case is ignored, and "_", "/" and "-" are equal.

    Raises:
        ConfigError: there is none; the message lists similar names.
    """
    names = (*timm.TOWERS, *RECIPES, *architectures(), dinotxt.ARCHITECTURE)
    known = {_plain(architecture): architecture for architecture in names}
    if (found := known.get(_plain(name))) is not None:
        return found
    if timm.PLAIN_VIT.match(name):  # timm has many more, and adds the name of the weights
        return name
    near = [known[close] for close in difflib.get_close_matches(_plain(name), known, n=5)]
    hint = f"choose {', '.join(near)}" if near else "use one such as ViT-B-32"
    raise ConfigError(f"neither open_clip nor timm nor vlm has an architecture {name!r}: {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace("/", "-")


def open_state_dict(path: epath.Path, architecture: str) -> Checkpoint:
    """Open a file of weights of an architecture, or the folder of dino.txt.

    Tokenizers that are not CLIP's own are read from the files beside it.

    Raises:
        CheckpointError: no such file, it identifies another architecture, or it does not fit.
        ConfigError: an unknown `architecture`.
    """
    name = find_architecture(architecture)
    if name == dinotxt.ARCHITECTURE:
        return dinotxt.open_folder(path)
    if not path.is_file() or path.suffix not in _ENDINGS:
        raise CheckpointError(
            f"architecture {name!r} is for a file of weights ({', '.join(_ENDINGS)}), which "
            f"{os.fspath(path)!r} is not: leave it out, or give such a file"
        )
    tensors = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    script = isinstance(tensors, TorchFile) and tensors.is_script
    if script or "input_resolution" in tensors.shapes:
        raise CheckpointError(
            f"{path} is a file of OpenAI's, which identifies its own architecture: leave "
            f"architecture {name!r} out"
        )
    where = f"{path} as {name}"
    if name in RECIPES:
        library, checkpoint = "vlm", _from_recipe(path, name, tensors)
    elif name in architectures():
        values, library = architectures()[name], "open_clip"
        checkpoint = open_clip.described(path.parent, values, {}, tensors, where, name=path.stem)
    else:
        library, checkpoint = "timm", timm_folders.from_state_dict(path, name, tensors)
    _LOG.info(
        "%s has no preprocessing of its own: it uses %s's default, %s",
        path,
        library,
        checkpoint.preprocess,
    )
    return checkpoint


def _from_recipe(path: epath.Path, name: str, tensors: Tensors) -> Checkpoint:
    """Describe a file with vlm's names of parameters, such as "vision.stem.kernel".

    SigLIP's vocabulary is read from `tokenizer.json` beside it.
    """
    family, size = name.split("-", 1)
    if family == "clip":
        recipe = recipes.clip(size)
        tokenizer = clip_tokenizer(recipe["tokenizer"].context_length)
    else:
        file = path.parent / VOCABULARY_FILE
        if not file.exists():
            raise CheckpointError(
                f"{path} as {name}: the package has no vocabulary of SigLIP's: put its "
                f"{VOCABULARY_FILE} into {path.parent}"
            )
        recipe = recipes.siglip(size, tokenizer_file=os.fspath(file))
        tokenizer = Tokenizer.from_file(file, recipe["tokenizer"])
    config = recipe["model"]
    words = tensors.shapes.get("text.embedding", (config.text_transformer.vocab_size,))[0]
    text = dataclasses.replace(config.text_transformer, vocab_size=words)
    config = dataclasses.replace(config, text=text)
    names = flat_shapes(abstract_model(config, np.dtype(np.float32)))
    return Checkpoint(
        path.stem,
        config,
        recipe["preprocess"],
        tokenizer,
        tensors,
        [Rule(name, name) for name in names],
        lambda name: False,
        "bicubic_antialias",
    )
