"""Convolutions in the form that each kind of device is quick at."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_APART = 16  # channels, the numbers in a line of the cache


class Conv(nnx.Module):
    """A convolution of `size` x `size`, padded so that a stride of one keeps the image's size.

    `depthwise`, each output looks at one input alone; `outputs` is then a multiple of `inputs`.
    `edges` are the rows and columns of zeros before and after the image; None: as many of each.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        depthwise: bool = True,
        edges: tuple[int, int] | None = None,
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
            # The checker takes the stride for one of the results.
            x = lax.platform_dependent(x, kernel, cpu=by_shifts, default=form)  # pyright: ignore[reportAssignmentType]
        else:
            x = form(x, kernel)
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


def _convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k i d"],
    *,
    stride: int,
    edges: tuple[int, int],
):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (edges, edges),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def _shift_and_add(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k 1 d"],
    *,
    stride: int,
    edges: tuple[int, int],
):
    """The same of a depthwise kernel: XLA's CPU convolutions crawl over many groups.

    Pixels that lie a power of two apart share few lines of the cache, and a 7x7 kernel reads 49 at
    a time: `_APART` channels of nothing move them.
    """
    size, _, _, outputs = kernel.shape
    # At a stride a pixel is read too seldom to be worth its way through memory.
    hold = _held if stride == 1 else lambda compute, *inputs: compute(*inputs)
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


def _held(compute: Callable, *inputs: Array) -> Array:
    """What `compute` returns, written to memory before anything reads it.

    XLA's CPU compiler would compute it again inside each of its readers, and does not look into
    the branches of a condition. This one is true of any number, which the compiler does not see.
    """
    one = inputs[0].ravel()[0]
    shape = jax.eval_shape(compute, *inputs)
    return lax.cond(
        (one == one) | (one != one),
        compute,
        lambda *_: jnp.zeros(shape.shape, shape.dtype),
        *inputs,
    )
