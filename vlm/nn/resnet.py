"""Layers of CLIP's ResNet: anti-aliased bottlenecks and inference batch norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

EXPANSION = 4  # output channels / block channels


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


def average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    """Average pooling over `size` x `size` squares; incomplete squares are dropped."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    h, w = h // size, w // size
    x = x[:, : h * size, : w * size].reshape(b, h, size, w, size, c)
    return x.mean((2, 4))


def conv(inputs: int, outputs: int, size: int, *, strides: int = 1, dtype, rngs) -> nnx.Conv:
    """Convolution without bias and with "same" padding."""
    padding = ((size // 2, size // 2),) * 2
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=strides,
        padding=padding,
        use_bias=False,
        dtype=dtype,
        rngs=rngs,
    )


class Bottleneck(nnx.Module):
    """Bottleneck of 1x1, 3x3 and 1x1 convolutions, with average pooling instead of a stride."""

    def __init__(self, inputs: int, width: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        outputs = width * EXPANSION
        self.conv1 = conv(inputs, width, 1, dtype=dtype, rngs=rngs)
        self.norm1 = FrozenBatchNorm(width)
        self.conv2 = conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.norm2 = FrozenBatchNorm(width)
        self.conv3 = conv(width, outputs, 1, dtype=dtype, rngs=rngs)
        self.norm3 = FrozenBatchNorm(outputs)
        changes = stride > 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, 1, dtype=dtype, rngs=rngs) if changes else None
        self.shortcut_norm = FrozenBatchNorm(outputs) if changes else None
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(average_pool(y, self.stride)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(average_pool(x, self.stride)))
        return jax.nn.relu(x + y)
