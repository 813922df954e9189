"""Matrix products in float8 (arXiv:2209.05433), with a scale for each tensor and no state.

A tensor is a device's rows where `vlm.nn.fsdp.per_batch_shard` maps the towers. Else it is that of
all devices, which exchange its largest element.

Inputs and kernels are e4m3, and gradients e5m2, which has more range. XLA's GPU compiler replaces
a product of converted and scaled arrays by a float8 product of cuBLASLt. Other platforms convert
back and compute the same products in the type of the inputs, which is slower than without float8.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

INPUT_TYPE, GRADIENT_TYPE = jnp.float8_e4m3fn, jnp.float8_e5m2


@jax.custom_vjp
def product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """Product of `x` and a kernel that are both rounded to float8, in the type of `x`."""
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    rounded = _rounded(x, INPUT_TYPE), _rounded(kernel, INPUT_TYPE)
    wide, of_kernel = (_wide(each, x.dtype) for each in rounded)
    return _contract(wide, of_kernel, -1, 0), rounded


def _backward(rounded, gradient):
    (x, scale), kernel = rounded
    dtype, shape = gradient.dtype, x.shape  # the type of the product is that of its inputs
    rows = gradient.reshape(-1, gradient.shape[-1])
    gradient = _wide(_rounded(rows, GRADIENT_TYPE), dtype)
    of_x = _contract(gradient, _wide(kernel, dtype), -1, 1)
    x = _wide((x.reshape(-1, shape[-1]), scale), dtype)
    return of_x.reshape(shape), _contract(x, gradient, 0, 0)


product.defvjp(_forward, _backward)


def _rounded(x: Array, dtype: DTypeLike) -> tuple[Array, Float[Array, ""]]:
    """Round `x` to float8; return it with its scale.

    The scale is the power of two that brings the largest element to between half of the format's
    maximum and the maximum, so that dividing and multiplying by it is exact.
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
    _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    scale = jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), exponent), 1.0)
    # A value that is not finite makes the product so too, and the step is then skipped.
    scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan).astype(x.dtype)
    return (x / scale).astype(dtype), scale


def _wide(rounded: tuple[Array, Float[Array, ""]], dtype: DTypeLike) -> Array:
    """Convert a rounded array and its scale back: the pattern that XLA looks for."""
    x, scale = rounded
    return x.astype(dtype) * scale.astype(dtype)


def _contract(x: Array, y: Array, axis: int, other: int) -> Array:
    return lax.dot_general(x, y, (((axis % x.ndim,), (other,)), ((), ())))
