"""Low-rank adapters: what a linear layer gains beside its frozen kernel.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds scale * (x a) b to what the layer gives. DoRA (Liu et
al., 2024, arXiv:2402.09353) also gives each column of the sum of kernel and product a length that
is trained.
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class AdapterParam(nnx.Variable):
    """What an adapter trains; no parameter of the model itself."""


class AdapterScale(nnx.Variable):
    """The factor of an adapter: an array, so that another one needs no other program."""


class LowRank(nnx.Module):
    """The adapter of a linear layer, or with a leading axis those of a stack of them.

    A scale of zero switches it off.
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
        """DoRA's factor of each column of kernel + product; None for LoRA.

        No gradient goes through the length of the column (section 4.3 of the paper).
        """
        if self.magnitude is None:
            return None
        scale = self.scale[...]
        whole = kernel.astype(jnp.float32) + product(self.a[...], self.b[...], scale)
        factors = self.magnitude[...] / lax.stop_gradient(column_lengths(whole))
        return jnp.where(scale[..., None] == 0, 1, factors)


def product(
    a: Float[Array, "*l i r"], b: Float[Array, "*l r o"], scale: Float[Array, "*l"]
) -> Float[Array, "*l i o"]:
    """What an adapter adds to the kernel."""
    return jnp.matmul(a * scale[..., None, None], b, precision="highest")


def column_lengths(kernel: Float[Array, "*l i o"]) -> Float[Array, "*l o"]:
    """The Euclidean length of each column, and so of what each output weighs its inputs by."""
    lengths = jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(-2))
    return jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)  # a column of zeros stays zero
