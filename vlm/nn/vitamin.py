"""Convolutional stem of ViTamin (Chen et al., 2024, arXiv:2404.02132)."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.nn.conv import Conv
from vlm.nn.layers import LayerNorm, by_rows, gelu, linear

EXPANSION = 4  # inner channels / block channels


class InvertedBlock(nnx.Module):
    """Inverted bottleneck with layer norm (MBConv-LN)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        halve: bool,
        norm_eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        hidden, options = EXPANSION * outputs, {"dtype": dtype, "rngs": rngs}
        self.halve = halve
        changes = inputs != outputs
        self.shortcut = nnx.Linear(inputs, outputs, **options) if changes else None
        self.norm = LayerNorm(inputs, norm_eps, rngs=rngs)
        self.widen = nnx.Linear(inputs, hidden, **options)
        self.conv = Conv(hidden, hidden, 3, stride=2 if halve else 1, **options)
        self.narrow = nnx.Linear(hidden, outputs, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        short = average_of_three(x) if self.halve else x
        short = short if self.shortcut is None else linear(self.shortcut, short)
        y = by_rows(lambda x: gelu(linear(self.widen, x)), self.norm(x))
        return short + by_rows(lambda y: linear(self.narrow, gelu(y)), self.conv(y))


def average_of_three(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """3x3 average pooling of stride 2, excluding padding."""
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    zero = np.zeros((), x.dtype)  # a constant, so that JAX recognises a sum, which has a gradient
    total = lax.reduce_window(x, zero, lax.add, window, strides, edges)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / lax.reduce_window(ones, zero, lax.add, window, strides, edges)


class ConvStages(nnx.Module):
    """Stem, stages of inverted bottlenecks, and a convolution to the token width."""

    def __init__(
        self,
        stem_width: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        width: int,
        *,
        norm_eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(3, stem_width, 3, stride=2, depthwise=False, **options)
        self.norm1 = LayerNorm(stem_width, norm_eps, rngs=rngs)
        self.conv2 = Conv(stem_width, stem_width, 3, depthwise=False, **options)
        stages, inputs = [], stem_width
        for outputs, depth in zip(widths, depths, strict=True):
            blocks = []
            for number in range(depth):
                halve = number == 0
                block = InvertedBlock(inputs, outputs, halve=halve, norm_eps=norm_eps, **options)
                blocks.append(block)
                inputs = outputs
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.last_norm = LayerNorm(inputs, norm_eps, rngs=rngs)
        self.last = Conv(inputs, width, 3, stride=2, depthwise=False, **options)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        x = self.conv2(gelu(self.norm1(self.conv1(images.astype(self.dtype)))))
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        x = self.last(self.last_norm(x))
        return x.reshape(x.shape[0], -1, x.shape[-1])
