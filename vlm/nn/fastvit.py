"""Layers of FastViT in reparameterised form.

The convolutions, batch norms and skips of a training-time block are fused into one convolution with
a bias (Vasu et al., 2023, arXiv:2303.14189).
"""

from collections.abc import Callable

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.nn.attention import Attention
from vlm.nn.conv import Conv
from vlm.nn.layers import LayerNorm, Linear, Mlp, gelu


class Squeeze(nnx.Module):
    """Squeeze-and-excitation: channel weights from the image mean (arXiv:1709.01507)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        act: Callable[[Array], Array] = jax.nn.relu,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.down = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up = Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.act = act

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        weights = jax.nn.sigmoid(self.up(self.act(self.down(x.mean((1, 2))))))
        return x * weights[:, None, None]


class Halving(nnx.Module):
    """Downsampling layer: 7x7 convolution of stride 2 and 1x1 convolution, each with a GELU."""

    def __init__(self, inputs: int, outputs: int, squeeze: int, *, dtype, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, 7, stride=2, dtype=dtype, rngs=rngs)
        self.squeeze = Squeeze(outputs, squeeze, dtype=dtype, rngs=rngs) if squeeze else None
        self.project = Linear(outputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        x = self.conv(x)
        if self.squeeze is not None:
            x = self.squeeze(x)
        return gelu(self.project(gelu(x)))


class Layer(nnx.Module):
    """Token mixer (3x3 convolution or attention), then a 7x7 convolution and an MLP.

    The skip of the mixing convolution and the layer scales of all branches are fused.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        heads: int,
        *,
        norm_eps: float | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm = (
            LayerNorm(width, norm_eps, rngs=rngs) if heads and norm_eps is not None else None
        )
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs) if heads else None
        self.mixer = None if heads else Conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.conv = Conv(width, width, 7, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, mlp_dim, "gelu", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.attention is None:
            assert self.mixer is not None
            x = self.mixer(x)
        else:
            tokens = x.reshape(x.shape[0], -1, x.shape[-1])
            tokens = tokens if self.norm is None else self.norm(tokens)
            x = x + self.attention(tokens).reshape(x.shape)
        return x + self.mlp(self.conv(x))


class Stage(nnx.Module):
    """Stage of blocks of one width, with optional downsampling and position embedding."""

    def __init__(self, stage, inputs: int, *, norm_eps: float, dtype, rngs: nnx.Rngs):
        s, options = stage, {"dtype": dtype, "rngs": rngs}
        self.halve = Halving(inputs, s.width, s.squeeze, **options) if s.halve else None
        self.position = Conv(s.width, s.width, 7, **options) if s.position else None
        eps = norm_eps if s.norm else None
        self.layers = nnx.List(
            Layer(s.width, s.mlp_dim, s.heads, norm_eps=eps, **options) for _ in range(s.depth)
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        for part in (self.halve, self.position, *self.layers):
            if part is not None:
                x = part(x)
        return x
