"""The parts of FastViT, reparameterised: each of its blocks of several branches is one convolution.

What several convolutions, batch norms and skips add up to while training is one convolution with a
bias at inference (Vasu et al., 2023, arXiv:2303.14189): that one is what is kept here.
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
    """Squeeze-and-excitation: channels weighed by what the whole image shows (arXiv:1709.01507)."""

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
    """What a stage begins with: a 7x7 convolution of stride 2 and one of 1x1, a GELU after each."""

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
    """A mixer of places, a 3x3 convolution or attention, then a 7x7 convolution and an MLP.

    The convolution that mixes has its own skip inside, and so have all branches their factors.
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
    """Layers of one width, after a halving of the image and positions where there are any."""

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
