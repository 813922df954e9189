"""Convolutions with a fast implementation for each platform, and layers between them."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.nn.layers import Linear
from vlm.sharding import varying_like

Edges = tuple[int, int]  # zero padding before and after the image

_APART = 16  # padding channels: float32 values per cache line


class Conv(nnx.Module):
    """Convolution of `size` x `size` with "same" padding.

    If `depthwise`, each output channel reads one input channel, and `outputs` is a multiple of
    `inputs`. `edges` is the zero padding before and after the image; None pads symmetrically.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        depthwise: bool = True,
        edges: Edges | None = None,
        use_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, 1 if depthwise else inputs, outputs)
        init = nnx.initializers.he_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None
        self.stride, self.depthwise, self.dtype = stride, depthwise, dtype
        self.edges = edges or (size // 2, size // 2)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        kernel = self.kernel[...].astype(self.dtype)
        options = {"stride": self.stride, "edges": self.edges}
        form = functools.partial(_convolve, **options)
        if self.depthwise:
            by_shifts = functools.partial(_shift_and_add, **options)
            # The type checker mistakes the stride for a result.
            x = lax.platform_dependent(x, kernel, cpu=by_shifts, default=form)  # pyright: ignore[reportAssignmentType]
        else:
            x = form(x, kernel)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation with stored statistics, which get no gradient."""

    def __init__(self, width: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.Param(jnp.zeros(width))
        self.var = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        mean = lax.stop_gradient(self.mean[...].astype(jnp.float32))
        var = lax.stop_gradient(self.var[...].astype(jnp.float32))
        factor = self.scale[...] * lax.rsqrt(var + self.eps)
        return ((x.astype(jnp.float32) - mean) * factor + self.bias[...]).astype(x.dtype)


class Squeeze(nnx.Module):
    """Squeeze-and-excitation: channel weights from the image mean (arXiv:1709.01507)."""

    def __init__(
        self, width: int, hidden: int, *, act: Literal["relu", "silu"] = "relu", **options: Any
    ):
        self.down = Linear(width, hidden, **options)
        self.up = Linear(hidden, width, **options)
        self.act: Literal["relu", "silu"] = act  # a name can be pickled

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        act = {"relu": jax.nn.relu, "silu": jax.nn.silu}[self.act]
        weights = jax.nn.sigmoid(self.up(act(self.down(x.mean((1, 2))))))
        return x * weights[:, None, None]


def _convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k i d"], *, stride: int, edges: Edges
) -> Float[Array, "b p q d"]:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (edges, edges),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def _shift_and_add(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 d"], *, stride: int, edges: Edges
) -> Float[Array, "b p q d"]:
    """Depthwise convolution as a sum of shifted images, since XLA's CPU grouped ones are slow.

    Addresses that differ by powers of two map to few cache sets, and a 7x7 kernel reads 49 pixels
    at a time: pad channels by `_APART` to avoid cache-set conflicts.
    """
    size, _, _, outputs = kernel.shape
    # With a stride, pixels are read too rarely for materialising to pay off.
    hold = _materialise if stride == 1 else lambda compute, *inputs: compute(*inputs)
    x = jnp.repeat(x, outputs // x.shape[-1], axis=-1)
    x = hold(lambda x: jnp.pad(x, ((0, 0), edges, edges, (0, _APART))), x)
    kernel = hold(lambda k: jnp.pad(k[:, :, 0], ((0, 0), (0, 0), (0, _APART))), kernel)
    h, w = (side - size + 1 for side in x.shape[1:3])

    def added(x, kernel):
        return sum(
            x[:, i : i + h : stride, j : j + w : stride, :outputs] * kernel[i, j, :outputs]
            for i in range(size)
            for j in range(size)
        )

    return hold(added, x, kernel)


def _materialise(compute: Callable, *inputs: Array) -> Array:
    """Compute a result once and write it to memory before it is read.

    XLA's CPU compiler would fuse (and so repeat) the computation in each consumer, but does not
    fuse into the branches of a conditional. The condition is always true.
    """
    one = inputs[0].ravel()[0]
    shape = jax.eval_shape(compute, *inputs)
    return lax.cond(
        (one == one) | (one != one),
        compute,
        lambda *inputs: varying_like(jnp.zeros(shape.shape, shape.dtype), inputs),
        *inputs,
    )
