"""An adapter as a folder: the factors of its layers, and of which model they are.

`adapter.json` names the model that it belongs to by its fingerprint and says where it was found;
`adapter.safetensors` holds the factors under our names. The model itself is not in it.
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
from vlm.errors import CheckpointError, ConfigError
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.adapters import Adapter, Factors
from vlm.models.dual_encoder import DualEncoder
from vlm.weights.digests import Checked, digests, fingerprint
from vlm.weights.fields import read_json_of_format, show, string, whole
from vlm.weights.files import SafetensorsFiles, write_safetensors
from vlm.weights.new_folder import new_folder

ADAPTER_FILE = "adapter.json"
FACTORS_FILE = "adapter.safetensors"
FILES = frozenset([ADAPTER_FILE, FACTORS_FILE])
FORMAT = 1  # of the folder; raised when an older reader would misread it
_PARTS = ("a", "b", "scale", "magnitude")  # of a layer; the last one is DoRA's alone


@dataclass(frozen=True)
class AdapterOrigin:
    """How an adapter was made, and the model under it."""

    config: AdapterConfig
    base: str | None  # what `vlm.load` takes; None: a model that was not loaded
    base_fingerprint: str | None  # None: not known, as of an adapter from elsewhere


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder says of an adapter."""

    where: str
    name: str
    origin: AdapterOrigin
    factors_for: Callable[[DualEncoder, Tokenizer], Adapter]  # the model under it
    preprocess: PreprocessConfig | None = None  # None: that of the model under it
    context_length: int | None = None
    fingerprint: str | None = None  # of the factors and the model under them

    def check_base(self, found: str, name: str) -> None:
        """Raise a CheckpointError unless the model of that fingerprint is the adapter's."""
        wanted = self.origin.base_fingerprint
        if wanted is not None and found != wanted:
            raise CheckpointError(
                f"the adapter {self.where} is of {self.origin.base} (fingerprint {wanted[:12]}), "
                f"and {name} is another model ({found[:12]}): give it the one it was trained on"
            )


def recognises(path: epath.Path) -> bool:
    """Whether `path` is an adapter, or a run that has left one."""
    return _folder(path) is not None


def open_adapter(path: epath.Path) -> SavedAdapter:
    """What `write_adapter` wrote.

    Raises:
        CheckpointError: it is of a later format, torn, or not as it was saved.
    """
    folder = _folder(path)
    assert folder is not None, f"{path} is no adapter: see `recognises`"
    file = folder / ADAPTER_FILE
    about = read_json_of_format(file, FORMAT)
    try:
        base = dict(about["base"])
        saved, found = string(about["fingerprint"], "fingerprint"), dict(about["digests"])
        below = string(base["fingerprint"], "base.fingerprint")
        if _fingerprint(below, found) != saved:
            raise ValueError("its digests are not those of its fingerprint")
        described = {
            "name": string(about["name"], "name"),
            "origin": AdapterOrigin(
                from_dict(AdapterConfig, about["config"]),
                string(base["model"], "base.model"),
                below,
            ),
            "preprocess": from_dict(PreprocessConfig, about["preprocess"]),
            "context_length": whole(about["context_length"], "context_length"),
        }
    except (ValueError, KeyError, TypeError, ConfigError, CheckpointError) as error:
        raise CheckpointError(
            f"{file} is not as saved ({str(error)[:400]}): save the adapter again"
        ) from None
    tensors = Checked(SafetensorsFiles([folder / FACTORS_FILE]), found, beside=ADAPTER_FILE)
    if missing := sorted(found.keys() ^ set(tensors.shapes)):
        raise CheckpointError(
            f"{folder / FACTORS_FILE} and the {ADAPTER_FILE} beside it do not agree on "
            f"{show(missing[0])}: copy the adapter again"
        )
    layers: dict[str, dict[str, Any]] = {}
    for name in tensors.shapes:
        layer, _, part = name.rpartition(".lora.")
        if not layer or part not in _PARTS:
            raise CheckpointError(f"{folder / FACTORS_FILE} has {show(name)}: save it again")
        layers.setdefault(layer, {})[part] = tensors.read(name)
    for layer, parts in layers.items():
        if missing := [part for part in _PARTS[:3] if part not in parts]:
            raise CheckpointError(
                f"{folder / FACTORS_FILE} has no {missing[0]} of {layer}: save it again"
            )
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
    """Write an adapter as a folder, or over the one that is there; returns its fingerprint.

    Raises:
        ConfigError: the model under it was not loaded from anywhere.
        CheckpointError: the folder holds something else, or cannot be written.
    """
    if origin.base is None:
        raise ConfigError(
            f"the model under the adapter of {name} is not that of a path or an id alone: save it, "
            "load it from there, and put the adapter on that"
        )
    arrays = [
        (f"{layer}.lora.{part}", np.asarray(getattr(factors, part)))
        for layer, factors in sorted(adapter.items())
        for part in _PARTS
        if getattr(factors, part) is not None
    ]
    with new_folder(folder, FILES) as new:
        found: dict[str, list[str]] = {}

        def written(name: str, values: np.ndarray) -> None:
            found[name] = digests(name, values)

        write_safetensors(new / FACTORS_FILE, arrays, {"format": "vlm"}, written)
        whole_fingerprint = _fingerprint(origin.base_fingerprint, found)
        description = {
            "format": FORMAT,
            "version": __version__,
            "name": name,
            "fingerprint": whole_fingerprint,
            "base": {"model": origin.base, "fingerprint": origin.base_fingerprint},
            "config": to_dict(origin.config),
            "preprocess": to_dict(preprocess),
            "context_length": context_length,
            "templates": list(templates),
            "digests": found,
        }
        (new / ADAPTER_FILE).write_text(json.dumps(description, indent=2) + "\n")
    return whole_fingerprint


def _fingerprint(base: str | None, found: dict[str, list[str]]) -> str:
    """One digest for a model and what is added to it."""
    return hashlib.sha256(f"{base} {fingerprint(found)}".encode()).hexdigest()[:32]


def _folder(path: epath.Path) -> epath.Path | None:
    return next((f for f in (path, path / "bundle") if (f / ADAPTER_FILE).exists()), None)
