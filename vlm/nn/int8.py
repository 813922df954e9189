"""Symmetric int8 quantization of frozen kernels, with one scale per output channel."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

_LARGEST = 127  # symmetric: -128 is not used


class KernelScale(nnx.Variable):
    """Scale of each output channel of a quantized kernel."""


def quantize(
    kernel: Float[Array, "*l i o"],
) -> tuple[Int8[Array, "*l i o"], Float[Array, "*l o"]]:
    """Round to integers from -127 to 127; return them and the scale of each output channel."""
    scale = jnp.abs(kernel).max(-2).astype(jnp.float32) / _LARGEST
    scale = jnp.where(scale == 0, 1, scale)  # a column of zeros
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale
