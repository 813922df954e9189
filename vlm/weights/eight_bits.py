"""Weights of eight bits with a scale for each channel, in int8 or float8.

Rounding is to the nearest number (Dettmers et al., 2022, arXiv:2208.07339, without outliers in
float16; Micikevicius et al., 2022, arXiv:2209.05433, for float8).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped

from vlm.errors import CheckpointError
from vlm.weights.dequantized import DequantizedTensors, QuantizedTensor
from vlm.weights.files import Tensors

EightBits = Literal["int8", "float8"]

SMALLEST = 4096  # elements: smaller parameters stay as they are
GROUP = 16  # elements: a scale for fewer would take as much space
_SCALE = ":scale"  # ending of the name of the scales, in a bundle
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


class EightBitArray(NamedTuple):
    """Numbers of eight bits, with the scale of each group."""

    steps: Shaped[np.ndarray, "*n"]
    scale: Float32[np.ndarray, "*n"]  # size 1 along the axis of a group


def quantized(values: Float32[np.ndarray, "*n"], axis: int) -> EightBitArray:
    """Round to 255 steps of equal size in each group along `axis`, including zero."""
    scale = _scale(values, axis, 127)
    return EightBitArray(np.rint(values / scale).astype(np.int8), scale)


def to_float8(values: Float32[np.ndarray, "*n"], axis: int) -> EightBitArray:
    """Round to float8 (e4m3), after scaling the largest value of each group to its largest."""
    scale = _scale(values, axis, _LARGEST)
    return EightBitArray((values / scale).astype(ml_dtypes.float8_e4m3fn), scale)


def _scale(values: np.ndarray, axis: int, largest: float) -> Float32[np.ndarray, "*n"]:
    most = np.abs(values).max(axis, keepdims=True)
    return (np.where(most > 0, most, 1) / largest).astype(np.float32)


def best_form(
    values: Float32[np.ndarray, "*n"],
    quantize: Callable[[Any, int], EightBitArray],
    smallest: int = SMALLEST,
) -> EightBitArray | None:
    """Quantize along the axis with the least error: outputs of a kernel, or words of a table.

    Returns:
        None for vectors and small parameters, which are not worth it.
    """
    axes = [axis for axis, size in enumerate(values.shape) if size >= GROUP]
    if values.ndim < 2 or values.size < smallest or not axes:
        return None
    forms = (quantize(values, axis) for axis in axes)
    return min(
        forms,
        key=lambda form: float(
            np.square(form.steps.astype(np.float32) * form.scale - values).sum()
        ),
    )


def quantized_arrays(
    arrays: Iterable[tuple[str, Any]], kind: EightBits
) -> Iterator[tuple[str, Any]]:
    """Yield named parameters of eight bits, each followed by its scales."""
    quantize = {"int8": quantized, "float8": to_float8}[kind]
    for name, array in arrays:
        values = np.asarray(array)
        floats = np.issubdtype(values.dtype, np.floating) or values.dtype == ml_dtypes.bfloat16
        form = best_form(values.astype(np.float32), quantize) if floats else None
        if form is None:
            yield name, values
        else:
            yield name, form.steps
            yield name + _SCALE, form.scale


def restored(tensors: Tensors) -> Tensors:
    """Return the tensors of a bundle of eight bits as float32.

    Raises:
        CheckpointError: scales that do not fit their parameter.
    """
    found = {}
    for scale in [name for name in tensors.shapes if name.endswith(_SCALE)]:
        name = scale.removesuffix(_SCALE)
        shape, sizes = tensors.shapes.get(name, ()), tensors.shapes[scale]
        pairs = list(zip(shape, sizes, strict=False))
        if len(shape) != len(sizes) or any(b not in (1, a) for a, b in pairs):
            raise CheckpointError(
                f"{tensors.where} has {scale} of shape {sizes} for a parameter of {shape}: save "
                "the bundle again"
            )
        found[name] = QuantizedTensor(name, scale)
    return DequantizedTensors(tensors, found)
