"""The types that parameters are kept in, inside an exported program."""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from vlm.errors import check_choice

Dtype = Literal["float32", "bfloat16", "int8"]

SMALLEST = 4096  # elements: smaller parameters weigh little and may mean much
GROUP = 16  # elements: a scale for fewer would weigh as much as they do


class Quantised(NamedTuple):
    """Whole numbers from -127 to 127, and what a step of them is worth in each group."""

    steps: Int8[np.ndarray, "*n"]
    scale: Float32[np.ndarray, "*n"]  # one along the axis that is the group


def stored(
    path: tuple, values: Float[np.ndarray, "*n"], dtype: Dtype
) -> Float[np.ndarray, "*n"] | Quantised:
    """A parameter as it is kept; the scale and bias of the logits stay float32."""
    check_choice("dtype", dtype, get_args(Dtype))
    if str(path[0]).startswith("logit_") or dtype == "float32":
        return values.astype(np.float32)
    if dtype == "bfloat16":
        return values.astype(jnp.bfloat16)
    axes = [axis for axis, size in enumerate(values.shape) if size >= GROUP]
    if values.ndim < 2 or values.size < SMALLEST or not axes:
        return values.astype(np.float32)
    # The axis whose groups lose least: outputs of a kernel, or words of a table.
    forms = (quantised(values.astype(np.float32), axis) for axis in axes)
    return min(forms, key=lambda form: float(np.square(form.steps * form.scale - values).sum()))


def quantised(values: Float32[np.ndarray, "*n"], axis: int) -> Quantised:
    """Rounded to 255 steps of equal size in each group along `axis`, zero among them."""
    largest = np.abs(values).max(axis, keepdims=True)
    scale = (np.where(largest > 0, largest, 1) / 127).astype(np.float32)
    return Quantised(np.rint(values / scale).astype(np.int8), scale)


def restored(kept: np.ndarray | Quantised, compute: Literal["float32", "bfloat16"]) -> Array:
    """A parameter as it is computed with, inside a traced function."""
    if isinstance(kept, Quantised):
        return jnp.asarray(kept.steps).astype(jnp.float32) * kept.scale
    if kept.dtype == np.float32:
        return jnp.asarray(kept)
    return jnp.asarray(kept).astype(compute)
