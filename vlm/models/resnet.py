"""ResNet with attention pooling: the vision tower of OpenAI's first CLIP models."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import ResNetConfig
from vlm.nn.attention import Attention
from vlm.nn.auto_axes import auto_axes
from vlm.nn.conv import FrozenBatchNorm
from vlm.nn.intermediates import Intermediates, capture, part
from vlm.nn.transformer import Execution

EXPANSION = 4  # output channels / block channels


class ResNetTower(nnx.Module):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm).

    (Radford et al., 2021, arXiv:2103.00020, section 2.4.)
    """

    def __init__(
        self, config: ResNetConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.dtype = config, execution.dtype
        half, inputs = c.width // 2, c.width
        stem = (conv(3, half, 3, strides=2, **options), conv(half, half, 3, **options))
        self.stem = nnx.List([*stem, conv(half, c.width, 3, **options)])
        self.stem_norms = nnx.List([FrozenBatchNorm(w) for w in (half, half, c.width)])
        stages = []
        for stage, depth in enumerate(c.depths):
            width = c.width * 2**stage
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Bottleneck(inputs, width, stride, **options))
                inputs = width * EXPANSION
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        normal = nnx.initializers.normal(inputs**-0.5)
        self.position = nnx.Param(normal(rngs.params(), (c.tokens(), inputs)))
        self.pool = Attention(inputs, c.heads, output_width=embed_dim, **options)

    @auto_axes
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images deterministically.

        `intermediates` capture the output of each stage, and "pool/attention".
        """
        x = self._places(images, intermediates)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + self.position[...].astype(x.dtype)
        return self.pool(x[:, :1], x, intermediates=part(intermediates, "pool"))[:, 0]

    @auto_axes
    def dense(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Embed each position by letting it attend only to itself in the attention pool.

        So its own value is projected (MaskCLIP, arXiv:2112.01071).
        """
        x = self._places(images, None)
        x = x + self.position[...].astype(x.dtype)[1:]
        single = x.reshape(-1, 1, x.shape[-1])
        return self.pool(single).reshape(*x.shape[:2], -1)

    def _places(
        self, images: Float[Array, "b h w 3"], intermediates: Intermediates | None
    ) -> Float[Array, "b n d"]:
        x = images.astype(self.dtype)
        for layer, norm in zip(self.stem, self.stem_norms, strict=True):
            x = jax.nn.relu(norm(layer(x)))
        x = average_pool(x, 2)
        for number, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x)
            x = capture(intermediates, f"stages/{number}", x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Bottleneck(nnx.Module):
    """Bottleneck of 1x1, 3x3 and 1x1 convolutions, with average pooling instead of a stride."""

    def __init__(self, inputs: int, width: int, stride: int, **options: Any):
        outputs = width * EXPANSION
        self.conv1 = conv(inputs, width, 1, **options)
        self.norm1 = FrozenBatchNorm(width)
        self.conv2 = conv(width, width, 3, **options)
        self.norm2 = FrozenBatchNorm(width)
        self.conv3 = conv(width, outputs, 1, **options)
        self.norm3 = FrozenBatchNorm(outputs)
        changes = stride > 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, 1, **options) if changes else None
        self.shortcut_norm = FrozenBatchNorm(outputs) if changes else None
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(average_pool(y, self.stride)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(average_pool(x, self.stride)))
        return jax.nn.relu(x + y)


def conv(inputs: int, outputs: int, size: int, **options: Any) -> nnx.Conv:
    """Convolution without bias and with "same" padding."""
    padding = ((size // 2, size // 2),) * 2
    return nnx.Conv(inputs, outputs, (size, size), padding=padding, use_bias=False, **options)


def average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    """Average pooling over `size` x `size` squares; incomplete squares are dropped."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    h, w = h // size, w // size
    x = x[:, : h * size, : w * size].reshape(b, h, size, w, size, c)
    return x.mean((2, 4))


def flops(config: ResNetConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, stages and the attention pooling."""
    half, size = config.width // 2, config.image_size // 2
    stem = 2 * size**2 * 9 * (3 * half + half**2 + half * config.width)
    size, inputs, stages = size // 2, config.width, 0.0
    for stage, depth in enumerate(config.depths):
        width, outputs = config.width * 2**stage, config.width * 2**stage * EXPANSION
        for block in range(depth):
            before = size
            size //= 2 if stage > 0 and block == 0 else 1
            stages += 2 * before**2 * (inputs * width + 9 * width**2)
            stages += 2 * size**2 * width * outputs
            stages += 2 * size**2 * inputs * outputs if block == 0 else 0
            inputs = outputs
    tokens = size**2 + 1
    pool = 2 * (inputs**2 + 2 * tokens * inputs**2 + 2 * tokens * inputs + inputs * embed_dim)
    return {"stem": stem, "stages": stages, "pool": pool}
