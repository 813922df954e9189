"""ResNets of image classification (He et al., 2015, arXiv:1512.03385), as in timm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from vlm.config import ResNetV1Config
from vlm.models.conv_tower import ConvTower, grid_pool, grid_pool_flops
from vlm.models.projection import projection, projection_flops
from vlm.nn.conv import Conv, FrozenBatchNorm
from vlm.nn.transformer import Execution, run_stacked, stack_blocks


class ResNetV1Tower(ConvTower):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: ResNetV1Config, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.dtype = config, execution.dtype
        self.stem = _conv(3, c.stem_width, 7, stride=2, **options)
        self.stem_norm = FrozenBatchNorm(c.stem_width, eps=c.norm_eps)
        outputs = [c.stem_width * 2**s * (4 if c.bottleneck else 1) for s in range(len(c.depths))]
        self.stages = nnx.List(
            Stage(c, number, inputs, execution=execution, rngs=rngs)
            for number, inputs in enumerate((c.stem_width, *outputs[:-1]))
        )
        self.pool = grid_pool(c, c.width, embed_dim, **options)
        last = c.width if self.pool is None else embed_dim
        self.projection = projection(c, last, embed_dim, **options)

    def _first_layers(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
        return max_pool_3x3(jax.nn.relu(self.stem_norm(self.stem(images))))


class Stage(nnx.Module):
    """Stage: a first block, which may have a stride, then stacked blocks of one shape."""

    def __init__(
        self, config: ResNetV1Config, number: int, inputs: int, *, execution: Execution, rngs
    ):
        width, stride = config.stem_width * 2**number, 2 if number else 1
        kind = Bottleneck if config.bottleneck else Basic
        options = {"eps": config.norm_eps, "dtype": execution.dtype}
        self.first = kind(inputs, width, stride, rngs=rngs, **options)

        def block(rngs: nnx.Rngs) -> nnx.Module:
            return kind(width * kind.expansion, width, 1, rngs=rngs, **options)

        depth = config.depths[number]
        self.blocks = stack_blocks(block, depth - 1, rngs) if depth > 1 else None
        self.execution = execution

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        x = self.first(x)
        if self.blocks is None:
            return x
        return run_stacked(self.blocks, x, lambda block, x: block(x), self.execution)


class Basic(nnx.Module):
    """Block of two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, eps: float, **options: Any):
        self.conv1 = _conv(inputs, width, 3, stride=stride, **options)
        self.norm1 = FrozenBatchNorm(width, eps=eps)
        self.conv2 = _conv(width, width, 3, **options)
        self.norm2 = FrozenBatchNorm(width, eps=eps)
        self.shortcut = _shortcut(inputs, width, stride, eps, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """Block of 1x1, 3x3 and 1x1 convolutions; the 3x3 one has the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, eps: float, **options: Any):
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, width, 1, **options)
        self.norm1 = FrozenBatchNorm(width, eps=eps)
        self.conv2 = _conv(width, width, 3, stride=stride, **options)
        self.norm2 = FrozenBatchNorm(width, eps=eps)
        self.conv3 = _conv(width, outputs, 1, **options)
        self.norm3 = FrozenBatchNorm(outputs, eps=eps)
        self.shortcut = _shortcut(inputs, outputs, stride, eps, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Shortcut(nnx.Module):
    """1x1 convolution of a block whose input and output differ in shape."""

    def __init__(self, inputs: int, outputs: int, stride: int, eps: float, **options: Any):
        self.conv = _conv(inputs, outputs, 1, stride=stride, **options)
        self.norm = FrozenBatchNorm(outputs, eps=eps)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        return self.norm(self.conv(x))


def _shortcut(inputs: int, outputs: int, stride: int, eps: float, **options) -> Shortcut | None:
    if stride == 1 and inputs == outputs:
        return None
    return Shortcut(inputs, outputs, stride, eps, **options)


def _conv(inputs: int, outputs: int, size: int, *, stride: int = 1, **options: Any) -> Conv:
    return Conv(inputs, outputs, size, stride=stride, depthwise=False, use_bias=False, **options)


def max_pool_3x3(x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    """Maximum over 3x3 squares with a stride of 2."""
    h, w = x.shape[1:3]
    lowest = jnp.finfo(x.dtype).min
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=lowest)
    rows = [lax.slice_in_dim(x, i, i + h, 2, axis=1) for i in range(3)]
    parts = [lax.slice_in_dim(row, j, j + w, 2, axis=2) for row in rows for j in range(3)]
    found = parts[0]
    for part in parts[1:]:
        found = jnp.maximum(found, part)
    return found


def flops(config: ResNetV1Config, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, stages, pool and projection."""
    c, sides = config, config.sides()
    stages, inputs = 0.0, c.stem_width
    for number, (depth, side) in enumerate(zip(c.depths, sides[1:], strict=True)):
        width = c.stem_width * 2**number
        outputs = width * (4 if c.bottleneck else 1)
        for block in range(depth):
            before = sides[number] if number and not block else side
            if c.bottleneck:
                stages += 2 * before**2 * inputs * width
                stages += 2 * side**2 * (9 * width**2 + width * outputs)
            else:
                stages += 2 * side**2 * 9 * width * (inputs + width)
            if not block and (number or inputs != outputs):
                stages += 2 * side**2 * inputs * outputs
            inputs = outputs
    last = inputs if c.pool == "mean" else embed_dim
    return {
        "stem": 2 * sides[0] ** 2 * 147 * c.stem_width,
        "stages": stages,
        "pool": grid_pool_flops(c, inputs, embed_dim),
        "projection": projection_flops(c, last, embed_dim),
    }
