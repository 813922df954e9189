"""Quantized weights in folders of transformers, as the documented 8-bit layouts store them.

`quantization_config` of `config.json` names the layout. Weights of linear layers are int8 or fp8,
and their scales lie beside them. They become float32; activations are not quantized.

- bitsandbytes, LLM.int8(): `weight` and `SCB`, the largest value of each row (arXiv:2208.07339).
- compressed-tensors: `weight`, `weight_scale` and `weight_zero_point`.
- fbgemm_fp8: `weight` and `weight_scale` of each row.
- fp8: `weight` and `weight_scale_inv` of tiles, as DeepSeek-V3 has them (arXiv:2412.19437).
- quanto: `weight._data` and `weight._scale`, and the layers in `quanto_qmap.json`.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from vlm.errors import CheckpointError, brief
from vlm.weights.dequantized import DequantizedTensors, Grid, QuantizedTensor, grid_of
from vlm.weights.fields import boolean, fields, integer, read_json
from vlm.weights.files import Tensors

_LOG = logging.getLogger(__name__)
QUANTO = "quanto_qmap.json"
_FIX = "get the model in float32, float16 or bfloat16"
_READ = "bitsandbytes in 8 bits, compressed-tensors in 8 bits, fbgemm_fp8, fp8 and quanto"
_REASONS = {  # why a layout is refused
    "torchao": "its file layout changes between versions",
    "gptq": "weights are packed integers of 2 to 8 bits",
    "awq": "weights are packed integers of 4 bits",
    "hqq": "weights are packed integers of 1 to 8 bits",
    "aqlm": "weights are codes of codebooks",
    "vptq": "weights are codes of codebooks",
    "eetq": "weights are interleaved for one kernel of CUDA",
    "mxfp4": "weights are packed numbers of 4 bits",
}
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "dense")
# Of activations, which are computed without quantization here.
_ACTIVATIONS = (".input_scale", ".output_scale", ".input_zero_point", ".output_zero_point")


def dequantized(tensors: Tensors, folder: epath.Path) -> Tensors:
    """Return the tensors of a folder as numbers, if its files say how they are quantized.

    Raises:
        CheckpointError: a layout that vlm does not read, or scales that do not fit.
    """
    config = folder / "config.json"
    values = read_json(config).get("quantization_config") if config.exists() else None
    where = f"{config}: quantization_config"
    if (folder / QUANTO).exists():
        found = dict(_quanto(tensors, read_json(folder / QUANTO), os.fspath(folder / QUANTO)))
    elif values is None:
        return tensors
    else:
        found = dict(_named(tensors, fields(values, where), where))
    unused = {name for name in tensors.shapes if name.endswith(_ACTIVATIONS)}
    if any(name.endswith(_ACTIVATIONS[0]) for name in unused) and not (folder / QUANTO).exists():
        _LOG.warning("%s: activations are not quantized here, as the model was run with", where)
    unused |= {name for name in tensors.shapes if name.endswith(".weight_format")}
    return DequantizedTensors(tensors, found, unused)


def _named(
    tensors: Tensors, values: dict[str, Any], where: str
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield the quantized tensors of the layout that `quant_method` names."""
    method = values.get("quant_method")
    if method == "bitsandbytes":
        if not boolean(values.get("load_in_8bit", False), f"{where}.load_in_8bit"):
            raise CheckpointError(f"{where} is of bitsandbytes in 4 bits: {_FIX}")
        yield from _bitsandbytes(tensors)
    elif method == "compressed-tensors":
        _check_compressed(values, where)
        yield from _scaled(tensors, "_scale", _block(values, where))
    elif method == "fbgemm_fp8":
        yield from _scaled(tensors, "_scale", None)
    elif method == "fp8":
        sizes = values.get("weight_block_size") or (128, 128)
        yield from _scaled(tensors, "_scale_inv", _grid(sizes, f"{where}.weight_block_size"))
    else:
        reason = _REASONS.get(str(method))
        raise CheckpointError(
            f"{where}.quant_method is {brief(method)}"
            f"{'' if reason is None else f', where {reason}'}: {_FIX} (vlm reads {_READ})"
        )


def _bitsandbytes(tensors: Tensors) -> Iterator[tuple[str, QuantizedTensor]]:
    for name in _stems(tensors, ".SCB"):
        weight = f"{name}.weight"
        _check_rows(tensors, weight, f"{name}.SCB")
        layout = f"{name}.weight_format"
        if layout in tensors.shapes and (found := tensors.read(layout)).any():
            raise CheckpointError(
                f"{tensors.where}: {brief(layout)} is {brief(found.tolist())}, a tiled layout of "
                f"old versions of bitsandbytes: {_FIX}"
            )
        yield (
            weight,
            QuantizedTensor(weight, f"{name}.SCB", grid=_row(tensors, weight), factor=1 / 127),
        )


def _check_rows(tensors: Tensors, weight: str, scale: str) -> None:
    shape, scales = tensors.shapes.get(weight), tensors.shapes[scale]
    if shape is None or len(shape) != 2 or scales != shape[:1]:
        raise CheckpointError(
            f"{tensors.where} has {brief(scale)} of shape {scales} for a weight of {shape}: {_FIX}"
        )


def _row(tensors: Tensors, weight: str) -> Grid:
    return Grid(1, tensors.shapes[weight][1])


def _scaled(
    tensors: Tensors, suffix: str, block: Grid | None
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield each weight that has scales beside it, of these blocks if they are tiles."""
    for weight in _stems(tensors, suffix):
        if not weight.endswith("weight"):
            continue
        scale, shape = weight + suffix, tensors.shapes.get(weight)
        if shape is None or len(shape) != 2:
            raise CheckpointError(
                f"{tensors.where} has {brief(scale)}, and a weight of shape {shape}: {_FIX}"
            )
        scales, tiles = tensors.shapes[scale], None
        if block is not None:
            tiles = -(-shape[0] // block.rows), -(-shape[1] // block.columns)
        if tiles == scales:
            grid = block
        elif block is None or len(scales) < 2 or 1 in scales:
            grid = grid_of(tensors.where, scale, scales, shape)
        else:
            raise CheckpointError(
                f"{tensors.where} has {brief(scale)} of shape {scales}, which are not the tiles of "
                f"{tuple(block)} in a matrix of {shape}: download it again"
            )
        zero = f"{weight}_zero_point"
        if (zeros := tensors.shapes.get(zero, scales)) != scales:
            raise CheckpointError(
                f"{tensors.where} has {brief(zero)} of shape {zeros} for scales of {scales}: "
                "download it again"
            )
        yield weight, QuantizedTensor(weight, scale, zero if zero in tensors.shapes else None, grid)


def _quanto(
    tensors: Tensors, layers: dict[str, Any], where: str
) -> Iterator[tuple[str, QuantizedTensor]]:
    for layer, about in layers.items():
        kinds = fields(about, f"{where}: {layer}")
        kind = kinds.get("weights")
        if kind not in ("qint8", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e5m2"):
            raise CheckpointError(
                f"{where}: {layer}.weights is {brief(kind)}, not of 8 bits: {_FIX}"
            )
        if kinds.get("activations") not in (None, "none"):
            _LOG.warning("%s: activations are not quantized here, as in %s", where, layer)
        weight = f"{layer}.weight"
        values, scale = f"{weight}._data", f"{weight}._scale"
        if weight in tensors.shapes:  # saved before it was frozen
            continue
        for name in (values, scale):
            if name not in tensors.shapes:
                raise CheckpointError(f"{tensors.where} has no {brief(name)}: download it again")
        yield weight, QuantizedTensor(values, scale, grid=_quanto_grid(tensors, values, scale))


def _quanto_grid(tensors: Tensors, values: str, scale: str) -> Grid | None:
    """Return the blocks of scales in a row; None for scales that broadcast."""
    shape, scales = tensors.shapes[values], tensors.shapes[scale]
    same_rank = len(scales) == len(shape)
    if scales in ((), (1,)) or (
        same_rank and all(b in (1, a) for a, b in zip(shape, scales, strict=True))
    ):
        return None
    if len(shape) == 2 and scales == shape[:1]:
        return grid_of(tensors.where, scale, scales, shape)
    raise CheckpointError(
        f"{tensors.where} has {brief(scale)} of shape {scales} for a weight of {shape}, "
        "which is neither one scale nor one for each row: download it again"
    )


def _check_compressed(values: dict[str, Any], where: str) -> None:
    """Check that weights are stored as numbers of 8 bits, or not quantized."""
    groups = fields(values.get("config_groups"), f"{where}.config_groups")
    formats = [values.get("format")] + [
        fields(group, f"{where}.config_groups.{name}").get("format")
        for name, group in groups.items()
    ]
    for form in formats:
        if form not in (None, "mixed-precision", *_FORMATS):
            raise CheckpointError(
                f"{where}.format is {brief(form)}: vlm reads {', '.join(_FORMATS)}, so {_FIX}"
            )
    for name in ("sparsity_config", "transform_config"):
        about = fields(values.get(name), f"{where}.{name}")
        if about.get("format", "dense") != "dense" or about.get("config_groups"):
            raise CheckpointError(f"{where} has a {name}, which vlm does not support: {_FIX}")


def _block(values: dict[str, Any], where: str) -> Grid | None:
    """Return the size of the tiles, if the weights of a group have scales of tiles."""
    groups = fields(values.get("config_groups"), where)
    sizes = [
        weights["block_structure"]
        for group in groups.values()
        if (weights := fields(fields(group, where).get("weights"), where)).get("block_structure")
    ]
    return _grid(sizes[0], f"{where}: block_structure") if sizes else None


def _grid(sizes: Any, where: str) -> Grid:
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise CheckpointError(f"{where} is {brief(sizes)}, not two sizes of a tile")
    return Grid(*(integer(size, where) for size in sizes))


def _stems(tensors: Tensors, ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in tensors.shapes if name.endswith(ending)]
