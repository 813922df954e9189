"""ViTamin (Chen et al., 2024, arXiv:2404.02132): convolutions, then blocks with a gated MLP."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from vlm.config import ViTaminConfig
from vlm.models.conv_tower import ConvTower
from vlm.models.projection import projection, projection_flops
from vlm.nn.conv import Conv
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.layers import LayerNorm, by_rows, gelu, linear
from vlm.nn.transformer import Execution, Transformer, block_flops

EXPANSION = 4  # inner channels / block channels


class ViTaminTower(ConvTower):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm).

    `intermediates` capture "stem" and the activations of the stack.
    """

    def __init__(
        self, config: ViTaminConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.dtype = config, execution.dtype
        self.stem = ConvStages(c, **options)
        normal, table = nnx.initializers.normal(c.width**-0.5), (c.tokens(), c.width)
        self.position = nnx.Param(normal(rngs.params(), table)) if c.position else None
        self.transformer = Transformer(
            c.width,
            c.depth,
            c.heads,
            c.mlp_dim,
            act="gelu",
            norm_eps=c.norm_eps,
            mlp="geglu",
            execution=execution,
            rngs=rngs,
        )
        self.norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.projection = projection(c, c.width, embed_dim, **options)

    def _positions(self, images, keys, intermediates: Intermediates | None) -> Array:
        x = self.stem(images)
        x = x if self.position is None else x + self.position[...].astype(x.dtype)
        x = capture(intermediates, "stem", x)
        return self.transformer(x, keys=keys, intermediates=intermediates)

    def _embedding(self, x: Float[Array, "*b c"]) -> Float[Array, "*b e"]:
        return super()._embedding(self.norm(x).astype(self.dtype))


class ConvStages(nnx.Module):
    """Stem, stages of inverted bottlenecks, and a convolution to the token width."""

    def __init__(self, config: ViTaminConfig, *, dtype: Any, rngs: nnx.Rngs):
        c, options = config, {"dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(3, c.stem_width, 3, stride=2, depthwise=False, **options)
        self.norm1 = LayerNorm(c.stem_width, c.norm_eps, rngs=rngs)
        self.conv2 = Conv(c.stem_width, c.stem_width, 3, depthwise=False, **options)
        stages, inputs = [], c.stem_width
        for outputs, depth in zip(c.conv_widths, c.conv_depths, strict=True):
            blocks = []
            for number in range(depth):
                halve = number == 0
                block = InvertedBlock(inputs, outputs, halve=halve, norm_eps=c.norm_eps, **options)
                blocks.append(block)
                inputs = outputs
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.last_norm = LayerNorm(inputs, c.norm_eps, rngs=rngs)
        self.last = Conv(inputs, c.width, 3, stride=2, depthwise=False, **options)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        x = self.conv2(gelu(self.norm1(self.conv1(images.astype(self.dtype)))))
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        x = self.last(self.last_norm(x))
        return x.reshape(x.shape[0], -1, x.shape[-1])


class InvertedBlock(nnx.Module):
    """Inverted bottleneck with layer norm (MBConv-LN)."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool, norm_eps: float, **options: Any):
        hidden = EXPANSION * outputs
        self.halve = halve
        changes = inputs != outputs
        self.shortcut = nnx.Linear(inputs, outputs, **options) if changes else None
        self.norm = LayerNorm(inputs, norm_eps, rngs=options["rngs"])
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


def flops(config: ViTaminConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, projections, scores, mlp, projection."""
    c, size = config, config.image_size // 2
    stem = 2 * size**2 * 9 * (3 * c.stem_width + c.stem_width**2)
    inputs = c.stem_width
    for outputs, depth in zip(c.conv_widths, c.conv_depths, strict=True):
        hidden = EXPANSION * outputs
        for number in range(depth):
            before = size
            size = (size + 1) // 2 if number == 0 else size
            stem += 2 * before**2 * inputs * hidden + 2 * size**2 * hidden * (9 + outputs)
            stem += 2 * size**2 * inputs * outputs * (inputs != outputs)
            inputs = outputs
    tokens = c.tokens()
    stem += 2 * tokens * 9 * inputs * c.width
    return {
        "stem": stem,
        **block_flops(c, tokens, gated=True),
        "projection": projection_flops(c, c.width, embed_dim),
    }
