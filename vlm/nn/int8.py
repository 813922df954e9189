"""Frozen kernels in eight bits: whole numbers, and one factor for each output."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

_LARGEST = 127  # symmetric: -128 is not used


class KernelScale(nnx.Variable):
    """The factor of each output of a kernel of whole numbers."""


def quantize(
    kernel: Float[Array, "*l i o"],
) -> tuple[Int8[Array, "*l i o"], Float[Array, "*l o"]]:
    """The nearest whole numbers from -127 to 127, and the factor of each output."""
    scale = jnp.abs(kernel).max(-2).astype(jnp.float32) / _LARGEST
    scale = jnp.where(scale == 0, 1, scale)  # a column of zeros
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale
