"""Reader and writer of `peft` adapters for transformers' CLIP and SigLIP.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Each layer has its own
matrices: `base_model.model.MODULE.lora_A.weight` of (rank, inputs), `lora_B.weight` of
(outputs, rank), and `lora_magnitude_vector` for DoRA.
"""

import collections
import math
import os
import re
from typing import Any

import numpy as np
from etils import epath

from vlm.config import AdapterConfig
from vlm.errors import CheckpointError, brief
from vlm.inputs.tokenizer import Tokenizer
from vlm.models.adapters import Adapter, Factors, LayerSize, linear_layers, size_of
from vlm.models.dual_encoder import DualEncoder
from vlm.weights.adapter import AdapterOrigin, SavedAdapter
from vlm.weights.fields import (
    boolean,
    fields,
    integer,
    list_names,
    number,
    read_json,
    string,
)
from vlm.weights.files import SafetensorsFile, read_parameter, write_safetensors
from vlm.weights.huggingface import RULES
from vlm.weights.new_folder import new_folder
from vlm.weights.rules import LINEAR, OUT
from vlm.weights.writing_huggingface import huggingface_config
from vlm.weights.writing_parts import dump

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # in some versions of 2024
}
# Fields that do not change the meaning of the matrices, or are read here. Any other field that is
# set is not supported.
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
    "lora_dropout", "bias", "use_rslora", "init_lora_weights", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "use_dora",
    "qalora_group_size", "runtime_config", "eva_config",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # that do not change the base model


def recognises(path: epath.Path) -> bool:
    """Return True if `path` is a folder that `peft` saved."""
    return (path / CONFIG_FILE).exists()


def open_peft(folder: epath.Path) -> SavedAdapter:
    """Open an adapter that `peft` saved; its matrices are read once the base model is known.

    peft stores no fingerprint of the base model, so another model of the same sizes is accepted.

    Raises:
        CheckpointError: another method than LoRA, or an option that is not supported.
    """
    file = folder / CONFIG_FILE
    values = read_json(file)
    _check_supported(values, os.fspath(file))
    base = values.get("base_model_name_or_path")
    config = AdapterConfig(
        rank=integer(values.get("r"), f"{file}: r"),
        alpha=number(values.get("lora_alpha"), f"{file}: lora_alpha", above=0.0),
        dora=boolean(values.get("use_dora") or False, f"{file}: use_dora"),
    )
    return SavedAdapter(
        where=os.fspath(folder),
        name=folder.name,
        origin=AdapterOrigin(
            config, None if base is None else string(base, f"{file}: base_model_name_or_path"), None
        ),
        factors_for=lambda model, tokenizer: _factors(folder, values, model, tokenizer),
    )


def write_peft(
    folder: epath.PathLike,
    adapter: Adapter,
    model: DualEncoder,
    tokenizer: Tokenizer,
    base: str | None,
) -> None:
    """Write an adapter as a folder that `peft` opens on transformers' form of `model`.

    Raises:
        CheckpointError: transformers does not support the model, or `peft` one of the layers.
    """
    places = _places(model, tokenizer)
    ours = {place[0] for place in places.values()}
    if foreign := sorted(name for name in adapter if name not in ours):
        raise CheckpointError(
            f"peft has no place for an adapter of {list_names(foreign)}: merge it into the model, "
            "or train one without these layers"
        )
    arrays: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for module, (name, layer) in places.items():
        if name not in adapter:
            continue
        one = _layer(adapter[name], layer)
        if one.scale == 0:
            continue
        arrays[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(one.a.T)
        arrays[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(one.b.T)
        if one.magnitude is not None:
            arrays[f"{_PREFIX}{module}.lora_magnitude_vector"] = one.magnitude
        ranks[module], alphas[module] = one.rank, float(one.scale) * one.rank
    if not ranks:
        raise CheckpointError("the adapter changes no layer, and peft takes none without one")
    rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    description = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in arrays),
        "target_modules": sorted(ranks),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with new_folder(folder) as new:
        dump(new / CONFIG_FILE, description)
        write_safetensors(new / WEIGHTS_FILE, sorted(arrays.items()), {"format": "pt"})


# ------------------------------------------------------------------------------------ reading


def _check_supported(values: dict[str, Any], where: str) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} is of type {brief(kind)}: vlm reads only LORA, and DoRA")
    odd = [name for name, value in values.items() if value and name not in _HARMLESS]
    if values.get("bias", "none") != "none":
        odd.append("bias")
    start = values.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:  # PiSSA and similar methods change the base model
        odd.append("init_lora_weights")
    if odd:
        listed = ", ".join(f"{name} {brief(values[name])}" for name in sorted(odd))
        raise CheckpointError(
            f"{where} has {listed}, which vlm does not support: merge the adapter into its model "
            "with peft, and load that"
        )


def _factors(
    folder: epath.Path, values: dict[str, Any], model: DualEncoder, tokenizer: Tokenizer
) -> Adapter:
    """Return the factors of each layer, stacked like our transformer blocks."""
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(f"{folder} holds a pickle: save the adapter again as safetensors")
    tensors = SafetensorsFile(file)
    places = _places(model, tokenizer)
    layers = linear_layers(model)
    factors: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
    unknown = []
    scales: dict[tuple[str, int | None], float] = {}
    for key in tensors.shapes:
        module, part = _split(key)
        if module not in places or part is None:
            unknown.append(key)
            continue
        name, layer = places[module]
        array = read_parameter(tensors, key).astype(np.float32)
        factors.setdefault(name, {}).setdefault(layer, {})[part] = array
        if part == "a":
            scales[name, layer] = _scale(values, module, array.shape[0], folder)
    if unknown:
        raise CheckpointError(
            f"{file} has {list_names(unknown)}, which have no place in the model: give the base "
            "that it was trained on, as CLIPModel or SiglipModel"
        )
    return {
        name: _joined(name, parts, size_of(layers[name]), scales, os.fspath(file))
        for name, parts in sorted(factors.items())
    }


def _split(key: str) -> tuple[str, str | None]:
    """Return (module, part) of a tensor's name."""
    key = key.removeprefix(_PREFIX)
    for ending, part in _PARTS.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), part
    return key, None


def _scale(values: dict[str, Any], module: str, rank: int, folder: epath.Path) -> float:
    """Return the factor of the product of a module's matrices."""
    where = f"{folder / CONFIG_FILE}: alpha_pattern"
    alpha = values["lora_alpha"]
    for pattern, value in fields(values.get("alpha_pattern"), where).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = number(value, where)
                break
        except re.error:
            raise CheckpointError(f"{where} has {brief(pattern)}, which is no pattern") from None
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _joined(
    name: str,
    parts: dict[int | None, dict[str, np.ndarray]],
    size: LayerSize,
    scales: dict[tuple[str, int | None], float],
    where: str,
) -> Factors:
    """Return the factors of a stack, padded to the largest rank; zero without an adapter."""
    for layer, part in parts.items():
        shapes = {kind: array.shape for kind, array in part.items()}
        rank = shapes.get("a", (0,))[0]
        wanted = {"a": (rank, size.inputs), "b": (size.outputs, rank)}
        if "magnitude" in part:
            wanted["magnitude"] = (size.outputs,)
        if shapes != wanted:
            place = name if layer is None else f"{name}, layer {layer},"
            raise CheckpointError(
                f"{where} has for {place} matrices of {shapes}, and the model takes {wanted}: "
                "give the base that it was trained on"
            )
    count, rank = size.layers or 1, max(part["a"].shape[0] for part in parts.values())
    a, b = np.zeros((count, size.inputs, rank)), np.zeros((count, rank, size.outputs))
    scale = np.zeros(count)
    dora = any("magnitude" in part for part in parts.values())
    magnitude = np.ones((count, size.outputs))
    for layer, part in parts.items():
        row = layer or 0
        own = part["a"].shape[0]
        a[row, :, :own], b[row, :own] = part["a"].T, part["b"].T
        scale[row] = scales[name, layer]
        magnitude[row] = part.get("magnitude", 1.0)
        if dora and "magnitude" not in part:
            raise CheckpointError(f"{where} has no lora_magnitude_vector for {name}: get it again")
    a, b, scale, magnitude = (
        np.asarray(x if size.layers else x[0], np.float32) for x in (a, b, scale, magnitude)
    )
    return Factors(a, b, scale, magnitude if dora else None)


# ------------------------------------------------------------------------------- both ways


def _places(model: DualEncoder, tokenizer: Tokenizer) -> dict[str, tuple[str, int | None]]:
    """Return our layer, and the index in its stack, for each linear module of transformers.

    Raises:
        CheckpointError: transformers does not support the model.
    """
    family = huggingface_config(model.config, tokenizer)["model_type"]
    layers = linear_layers(model)
    places: dict[str, tuple[str, int | None]] = {}
    for rule in RULES[family]:
        # A rule for several of our parameters is torch's MultiheadAttention. It and its `out_proj`
        # are not linear modules that peft can adapt.
        if rule.transform not in (LINEAR, OUT) or not isinstance(rule.ours, str):
            continue
        theirs, ours = rule.theirs.removesuffix(".weight"), rule.ours.removesuffix(".kernel")
        if ours not in layers or ours.startswith("vision.pool.attention."):
            continue
        count = size_of(layers[ours]).layers
        for layer in [None] if count is None else range(count):
            places[theirs.format(layer)] = ours, layer
    return places


def _layer(factors: Factors, layer: int | None) -> Factors:
    """Return the factors of one layer of a stack, without zero columns of padding."""

    def own(x) -> np.ndarray:
        return np.asarray(x if layer is None else x[layer], np.float32)

    a, b, scale = (own(x) for x in (factors.a, factors.b, factors.scale))
    magnitude = None if factors.magnitude is None else own(factors.magnitude)
    used = np.flatnonzero(np.abs(a).max(0) + np.abs(b).max(1))
    rank = int(used[-1]) + 1 if used.size else 1
    return Factors(a[:, :rank], b[:rank], scale, magnitude)
