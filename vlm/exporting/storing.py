"""Stored types of parameters in exported programs, and limits on their rounding."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm.errors import CheckpointError, check_choice
from vlm.weights.eight_bits import SMALLEST, EightBitArray, best_form, quantized

Dtype = Literal["float32", "bfloat16", "int8"]

# Largest change of direction of an embedding: 1 - cosine.
_DIRECTION: dict[Dtype, float] = {"float32": 1e-6, "bfloat16": 0.02, "int8": 0.02}


def stored(
    path: tuple, values: Float[np.ndarray, "*n"], dtype: Dtype
) -> Float[np.ndarray, "*n"] | EightBitArray:
    """Convert a parameter to its stored type; logit scale and bias stay float32."""
    check_choice("dtype", dtype, get_args(Dtype))
    if str(path[0]).startswith("logit_") or dtype == "float32":
        return values.astype(np.float32)
    if dtype == "bfloat16":
        return values.astype(jnp.bfloat16)
    form = best_form(values.astype(np.float32), quantized, SMALLEST)
    return values.astype(np.float32) if form is None else form


def restored(kept: np.ndarray | EightBitArray, compute: Literal["float32", "bfloat16"]) -> Array:
    """Convert a stored parameter to its compute type, inside a traced function."""
    if isinstance(kept, EightBitArray):
        return jnp.asarray(kept.steps).astype(jnp.float32) * kept.scale
    if kept.dtype == np.float32:
        return jnp.asarray(kept)
    return jnp.asarray(kept).astype(compute)


def check_stored(path: tuple, original: np.ndarray, kept: Any, dtype: Dtype) -> None:
    """Check that a stored parameter is off by no more than rounding to its type.

    That is half a step of 1/127 of the largest value in its group for int8, a relative 2**-8 for
    bfloat16.

    Raises:
        CheckpointError: the difference is larger.
    """
    original = original.astype(np.float32)
    values = np.asarray(restored(kept, "float32")).astype(np.float32)
    if isinstance(kept, EightBitArray):
        axes = [i for i, n in enumerate(kept.scale.shape) if n != original.shape[i]]
        allowed = np.abs(original).max(tuple(axes), keepdims=True) / 127 * 0.501
    else:
        allowed = np.abs(original) * (2**-8 if dtype == "bfloat16" else 0)
    far = np.abs(values - original) - allowed
    if not far.max(initial=0) <= 1e-12:
        name = ".".join(map(str, path))
        raise CheckpointError(
            f"{name} as {dtype} is {np.abs(values - original).max():.1e} from the model's, more "
            "than rounding explains, so nothing was written: choose another dtype"
        )


def check_direction(name: str, actual: np.ndarray, wanted: np.ndarray, dtype: Dtype) -> None:
    """Check the direction of embeddings by stored parameters: 1 - cosine of each example.

    Raises:
        CheckpointError: above 0.02 (1e-6 in float32).
    """
    product = (actual.astype(np.float64) * wanted).sum(axis=1)
    norms = np.linalg.norm(actual.astype(np.float64), axis=1) * np.linalg.norm(wanted, axis=1)
    far = float((1 - product / norms).max())
    if not far <= _DIRECTION[dtype]:
        raise CheckpointError(
            f"an embedding of the {name} program in {dtype} has a cosine of {1 - far:.4f} to the "
            f"model's, below {1 - _DIRECTION[dtype]}, so nothing was written: choose another dtype"
        )
