"""vlm's own format: a folder that `Bundle.save` writes."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
from etils import epath

from vlm._version import __version__
from vlm.config import (
    ModelConfig,
    PreprocessConfig,
    TokenizerConfig,
    find_codes,
    from_dict,
    to_dict,
)
from vlm.config.code import JAX_NN
from vlm.errors import CheckpointError, ConfigError, DataError, check_choice, warn_once
from vlm.inputs import tokenizer as tokenizers
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.dual_encoder import DualEncoder
from vlm.models.modules import is_module_class
from vlm.paths import as_path, is_run
from vlm.weights.adapter import ADAPTER_FILE, folder_with
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.eight_bits import EightBits, quantized_arrays, restored
from vlm.weights.fields import read_json, read_json_of_format, string
from vlm.weights.files import SafetensorsFile, Tensors
from vlm.weights.fingerprint import (
    VerifiedTensors,
    fingerprint,
    older_fingerprint,
    write_with_digests,
)
from vlm.weights.instantiate import abstract_model
from vlm.weights.new_folder import new_folder
from vlm.weights.rules import Rule, flat_arrays, flat_shapes

BUNDLE_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
FILES = frozenset([BUNDLE_FILE, WEIGHTS_FILE, tokenizers.VOCABULARY_FILE])
FORMAT = 2  # of the folder; 1 for parameters that are not quantized


def recognises(path: epath.Path) -> bool:
    """Return True if `path` is a bundle or a run folder."""
    return folder_with(BUNDLE_FILE, path) is not None or (path / "checkpoints").exists()


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """Open the checkpoint of a bundle, or of a run that has one.

    Raises:
        CheckpointError: it has a later format, is incomplete or corrupt, or the run is unfinished.
    """
    folder = folder_with(BUNDLE_FILE, path)
    if folder is None:
        raise CheckpointError(
            f"the run {path} has no bundle yet, which is written at its end: finish it with "
            f"vlm train --resume {path}"
        )
    file = folder / BUNDLE_FILE
    about = read_json_of_format(file, FORMAT)
    try:
        config = from_dict(ModelConfig, about["model"])
        preprocess = from_dict(PreprocessConfig, about["preprocess"])
        rules = from_dict(TokenizerConfig, about["tokenizer"])
        name, saved = string(about["name"], "name"), string(about["fingerprint"], "fingerprint")
        _find_code(config, dict(about.get("code", {})), os.fspath(path))
        digests = about.get("digests")  # None: a bundle from before there were digests
        valid = digests is None or isinstance(digests, dict)
        if not valid or (digests is not None and fingerprint(digests, config) != saved):
            raise ValueError("its digests are not those of its fingerprint")
    except MissingCodeError:
        raise
    except (ValueError, KeyError, TypeError, ConfigError, CheckpointError) as error:
        raise CheckpointError(
            f"{file} is not as saved ({str(error)[:400]}): save the bundle again"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(folder / tokenizers.VOCABULARY_FILE, rules)
    except (DataError, ConfigError) as error:
        raise CheckpointError(f"the bundle {folder} is incomplete: {error}") from None
    tensors: Tensors = SafetensorsFile(folder / WEIGHTS_FILE)
    if digests is not None:
        tensors = VerifiedTensors(tensors, digests)
    elif older_fingerprint(tensors) != saved:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} is not what was saved: it is damaged, or of another model "
            f"than the {BUNDLE_FILE} beside it; save or copy the bundle again"
        )
    return Checkpoint(
        name,
        config,
        preprocess,
        tokenizer,
        restored(tensors) if about["format"] > 1 else tensors,
        [Rule(name, name) for name in flat_shapes(abstract_model(config, jnp.float32))],
        lambda name: False,
        "bicubic_antialias",
        fingerprint=saved,
    )


class MissingCodeError(CheckpointError):
    """A tower whose class is not imported in this process."""


def _find_code(config: ModelConfig, hashes: dict[str, Any], where: str) -> None:
    """Find the classes of module towers among the imported modules.

    A folder could name any module, so opening one never imports code.

    Raises:
        MissingCodeError: a module is not imported, or has no such class.
    """
    for _, code in find_codes(config):
        if code.startswith(JAX_NN):  # an activation
            continue
        path, found = str(code), code.if_imported()
        module = path.partition(":")[0]
        if not is_module_class(found):
            if not code.importable:
                fix = f"define the class {code.name} first"
            elif module in sys.modules:
                fix = f"module {module} has no subclass of nnx.Module of that name"
            else:
                fix = f"import {module} first (on the command line: --import {module})"
            raise MissingCodeError(f"the model {where} uses code {path}: {fix}")
        if hashes.get(path) and code.source_hash() not in ("", hashes[path]):
            warn_once(f"{path} has changed since the model {where} was saved")


def check_quantize(quantize: str | None, form: str) -> None:
    """Raise a ConfigError if a bundle cannot be written with these weights."""
    if quantize is None:
        return
    check_choice("quantize", quantize, get_args(EightBits))
    if form != "vlm":
        raise ConfigError(
            f"quantize {quantize!r} is for bundles of vlm, not for {form}: leave it out"
        )


def write(
    folder: epath.PathLike,
    model: DualEncoder,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    name: str,
    templates: Sequence[str] = (),
    quantize: EightBits | None = None,
) -> str:
    """Write a bundle as a new folder or over an existing bundle; return its fingerprint.

    With `quantize`, large parameters have eight bits, and scales beside them.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    with new_folder(folder, FILES) as new:
        tokenizer.save(new)
        (new / tokenizers.RULES_FILE).unlink()  # the rules go into bundle.json
        arrays = flat_arrays(model)
        stored = arrays if quantize is None else quantized_arrays(arrays, quantize)
        digests = write_with_digests(new / WEIGHTS_FILE, stored)
        description: dict[str, Any] = {
            "format": 1 if quantize is None else FORMAT,
            "version": __version__,
            "name": name,
            "fingerprint": fingerprint(digests, model.config),
            "model": to_dict(model.config),
            "preprocess": to_dict(preprocess.config),
            "tokenizer": to_dict(tokenizer.config),
            "templates": list(templates),
            "digests": digests,
            "code": {str(code): code.source_hash() for _, code in find_codes(model.config)},
        }
        (new / BUNDLE_FILE).write_text(json.dumps(description, indent=2) + "\n")
    return description["fingerprint"]


def templates_of(model: epath.PathLike) -> tuple[str, ...]:
    """Return the prompt templates that a bundle, adapter or run was trained with, if any."""
    path = as_path(model)
    files = [f / n for f in (path, path / "bundle") for n in (BUNDLE_FILE, ADAPTER_FILE)]
    contents = next((read_json(file) for file in files if file.exists()), {})
    run = path.parent if path.name == "bundle" else path
    if "templates" not in contents and is_run(run):  # older bundles do not have them
        contents = read_json(run / "config.json").get("data", {})
    return tuple(map(str, contents.get("templates") or ()))
