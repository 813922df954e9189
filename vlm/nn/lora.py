"""Low-rank adapters of linear layers (LoRA and DoRA), and int8 quantization of their kernels.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds scale * (x a) b to the output of a layer. DoRA (Liu et
al., 2024, arXiv:2402.09353) also trains the length of each column of the adapted kernel.
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int8

_LARGEST_INT8 = 127  # symmetric: -128 is not used


class AdapterParam(nnx.Variable):
    """Trainable parameter of an adapter, as opposed to one of the model."""


class AdapterScale(nnx.Variable):
    """Scale of an adapter; an array, so that changing it needs no compilation."""


class LowRank(nnx.Module):
    """Adapter of a linear layer, or of a stack of layers with a leading axis.

    A scale of zero disables it.
    """

    def __init__(
        self,
        a: Float[Array, "*l i r"],
        b: Float[Array, "*l r o"],
        scale: Float[Array, "*l"],
        magnitude: Float[Array, "*l o"] | None = None,
    ):
        self.a, self.b = AdapterParam(a), AdapterParam(b)
        self.scale = AdapterScale(scale)
        self.magnitude = None if magnitude is None else AdapterParam(magnitude)

    def column_factors(self, kernel: Float[Array, "*l i o"]) -> Float[Array, "*l o"] | None:
        """DoRA's factor for each column of kernel + product; None for LoRA.

        The column length gets no gradient (section 4.3 of the paper).
        """
        if self.magnitude is None:
            return None
        scale = self.scale[...]
        merged = kernel.astype(jnp.float32) + product(self.a[...], self.b[...], scale)
        factors = self.magnitude[...] / lax.stop_gradient(column_lengths(merged))
        return jnp.where(scale[..., None] == 0, 1, factors)


def product(
    a: Float[Array, "*l i r"], b: Float[Array, "*l r o"], scale: Float[Array, "*l"]
) -> Float[Array, "*l i o"]:
    """Compute the update that an adapter adds to the kernel."""
    return jnp.matmul(a * scale[..., None, None], b, precision="highest")


def column_lengths(kernel: Float[Array, "*l i o"]) -> Float[Array, "*l o"]:
    """Euclidean length of each column of a kernel."""
    lengths = jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(-2))
    return jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)  # a column of zeros stays zero


class KernelScale(nnx.Variable):
    """Scale of each output channel of a quantized kernel."""


def quantize(
    kernel: Float[Array, "*l i o"],
) -> tuple[Int8[Array, "*l i o"], Float[Array, "*l o"]]:
    """Round to integers from -127 to 127; return them and the scale of each output channel."""
    scale = jnp.abs(kernel).max(-2).astype(jnp.float32) / _LARGEST_INT8
    scale = jnp.where(scale == 0, 1, scale)  # a column of zeros
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale
