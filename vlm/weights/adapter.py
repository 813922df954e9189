"""Adapters as folders: `adapter.json` and the low-rank factors in `adapter.safetensors`.

`adapter.json` has the fingerprint of the base model and the place it was loaded from. The factors
have our names. The base model is not in the folder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from vlm._version import __version__
from vlm.config import AdapterConfig, PreprocessConfig, from_dict, to_dict
from vlm.errors import CheckpointError, ConfigError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.adapters import Adapter, Factors
from vlm.models.dual_encoder import DualEncoder
from vlm.weights.fields import integer, read_json_of_format, string
from vlm.weights.files import SafetensorsFile
from vlm.weights.fingerprint import VerifiedTensors, fingerprint, write_with_digests
from vlm.weights.new_folder import new_folder

ADAPTER_FILE = "adapter.json"
FACTORS_FILE = "adapter.safetensors"
FILES = frozenset([ADAPTER_FILE, FACTORS_FILE])
FORMAT = 1  # of the folder; raised when an older reader would misread it
_PARTS = ("a", "b", "scale", "magnitude")  # of a layer; only DoRA has the last one


@dataclass(frozen=True)
class AdapterOrigin:
    """Config of an adapter, and its base model."""

    config: AdapterConfig
    base: str | None  # an argument of `vlm.load`; None: the base was not loaded
    base_fingerprint: str | None  # None: unknown, as for adapters of peft


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder."""

    where: str
    name: str
    origin: AdapterOrigin
    factors_for: Callable[[DualEncoder, Tokenizer], Adapter]  # of a base model
    preprocess: PreprocessConfig | None = None  # None: that of the base model
    context_length: int | None = None
    fingerprint: str | None = None  # of the factors and the base model

    def check_base(self, fingerprint: str, name: str) -> None:
        """Raise a CheckpointError unless `fingerprint` is that of the adapter's base model."""
        wanted = self.origin.base_fingerprint
        if wanted is not None and fingerprint != wanted:
            raise CheckpointError(
                f"the adapter {self.where} is of {self.origin.base} (fingerprint {wanted[:12]}), "
                f"and {name} is another model ({fingerprint[:12]}): give the base "
                "model of its training"
            )


def recognises(path: epath.Path) -> bool:
    """Return True if `path` is an adapter, or a run folder that has one."""
    return folder_with(ADAPTER_FILE, path) is not None


def folder_with(file: str, path: epath.Path) -> epath.Path | None:
    """Return `path` or its subfolder "bundle", whichever has the file first; None if neither."""
    return next((f for f in (path, path / "bundle") if (f / file).exists()), None)


def open_adapter(path: epath.Path) -> SavedAdapter:
    """Open a folder that `write_adapter` wrote.

    Raises:
        CheckpointError: it has a later format, is corrupt, or was changed after it was saved.
    """
    folder = folder_with(ADAPTER_FILE, path)
    assert folder is not None, f"{path} is no adapter: see `recognises`"
    file = folder / ADAPTER_FILE
    about = read_json_of_format(file, FORMAT)
    try:
        base = dict(about["base"])
        saved, digests = string(about["fingerprint"], "fingerprint"), dict(about["digests"])
        base_fingerprint = string(base["fingerprint"], "base.fingerprint")
        if _fingerprint(base_fingerprint, digests) != saved:
            raise ValueError("its digests are not those of its fingerprint")
        described = {
            "name": string(about["name"], "name"),
            "origin": AdapterOrigin(
                from_dict(AdapterConfig, about["config"]),
                string(base["model"], "base.model"),
                base_fingerprint,
            ),
            "preprocess": from_dict(PreprocessConfig, about["preprocess"]),
            "context_length": integer(about["context_length"], "context_length"),
        }
    except (ValueError, KeyError, TypeError, ConfigError, CheckpointError) as error:
        raise CheckpointError(
            f"{file} is not as saved ({str(error)[:400]}): save the adapter again"
        ) from None
    weights = folder / FACTORS_FILE
    tensors = VerifiedTensors(SafetensorsFile(weights), digests, beside=ADAPTER_FILE)
    if missing := sorted(digests.keys() ^ set(tensors.shapes)):
        raise CheckpointError(
            f"{weights} and the {ADAPTER_FILE} beside it do not agree on "
            f"{brief(missing[0])}: copy the adapter again"
        )
    layers: dict[str, dict[str, Any]] = {}
    for name in tensors.shapes:
        layer, _, part = name.rpartition(".lora.")
        if not layer or part not in _PARTS:
            raise CheckpointError(f"{weights} has {brief(name)}: save it again")
        layers.setdefault(layer, {})[part] = tensors.read(name)
    for layer, parts in layers.items():
        if missing := [part for part in _PARTS[:3] if part not in parts]:
            raise CheckpointError(f"{weights} has no {missing[0]} of {layer}: save it again")
    factors = {layer: Factors(**parts) for layer, parts in layers.items()}
    return SavedAdapter(
        os.fspath(folder),
        **described,
        factors_for=lambda model, tokenizer: factors,
        fingerprint=saved,
    )


def write_adapter(
    folder: epath.PathLike,
    adapter: Adapter,
    origin: AdapterOrigin,
    name: str,
    preprocess: PreprocessConfig,
    context_length: int,
    templates: Sequence[str] = (),
) -> str:
    """Write an adapter as a new folder or over an existing one; return its fingerprint.

    Raises:
        ConfigError: the base model was not loaded from a path or an id.
        CheckpointError: the folder holds something else, or cannot be written.
    """
    if origin.base is None:
        raise ConfigError(
            f"the base model of the adapter of {name} was not loaded from one path or id: save it, "
            "load it from there, and put the adapter on that"
        )
    arrays = [
        (f"{layer}.lora.{part}", np.asarray(getattr(factors, part)))
        for layer, factors in sorted(adapter.items())
        for part in _PARTS
        if getattr(factors, part) is not None
    ]
    with new_folder(folder, FILES) as new:
        digests = write_with_digests(new / FACTORS_FILE, arrays)
        description: dict[str, Any] = {
            "format": FORMAT,
            "version": __version__,
            "name": name,
            "fingerprint": _fingerprint(origin.base_fingerprint, digests),
            "base": {"model": origin.base, "fingerprint": origin.base_fingerprint},
            "config": to_dict(origin.config),
            "preprocess": to_dict(preprocess),
            "context_length": context_length,
            "templates": list(templates),
            "digests": digests,
        }
        (new / ADAPTER_FILE).write_text(json.dumps(description, indent=2) + "\n")
    return description["fingerprint"]


def _fingerprint(base: str | None, digests: dict[str, list[str]]) -> str:
    """Return one digest of a base model and the factors."""
    return hashlib.sha256(f"{base} {fingerprint(digests)}".encode()).hexdigest()[:32]
