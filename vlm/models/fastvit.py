"""MobileCLIP's vision tower: FastViT, reparameterised (arXiv:2303.14189, arXiv:2311.17049).

The convolutions, batch norms and skips of a training-time block are fused into one convolution with
a bias.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from vlm.config import FastViTConfig, FastViTStage
from vlm.models.conv_tower import ConvTower
from vlm.nn.attention import Attention
from vlm.nn.conv import Conv, Squeeze
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.layers import LayerNorm, Linear, Mlp, gelu
from vlm.nn.transformer import Execution


class FastViTTower(ConvTower):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: FastViTConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.dtype = config, execution.dtype
        width = c.stem_width
        self.stem = Conv(3, width, 3, stride=2, depthwise=False, **options)
        self.stem_halve = Conv(width, width, 3, stride=2, **options)
        self.stem_project = Linear(width, width, **options)
        inputs = (width, *(stage.width for stage in c.stages))
        self.stages = nnx.List(
            Stage(stage, i, norm_eps=c.norm_eps, **options)
            for i, stage in zip(inputs, c.stages, strict=False)
        )
        self.last = Conv(inputs[-1], c.width, 3, **options)
        self.squeeze = Squeeze(c.width, c.squeeze, **options)
        self.projection = Linear(c.width, embed_dim, **options)

    def _first_layers(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
        return gelu(self.stem_project(gelu(self.stem_halve(gelu(self.stem(images))))))

    def _positions(self, images, keys, intermediates: Intermediates | None) -> Array:
        x = super()._positions(images, keys, intermediates)
        name = f"stages/{len(self.stages)}"
        return capture(intermediates, name, gelu(self.squeeze(self.last(x))))


class Stage(nnx.Module):
    """Stage of blocks of one width, with optional downsampling and position embedding."""

    def __init__(self, stage: FastViTStage, inputs: int, *, norm_eps: float, **options: Any):
        s = stage
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


class Halving(nnx.Module):
    """Downsampling layer: 7x7 convolution of stride 2 and 1x1 convolution, each with a GELU."""

    def __init__(self, inputs: int, outputs: int, squeeze: int, **options: Any):
        self.conv = Conv(inputs, outputs, 7, stride=2, **options)
        self.squeeze = Squeeze(outputs, squeeze, **options) if squeeze else None
        self.project = Linear(outputs, outputs, **options)

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
        **options: Any,
    ):
        normed, rngs = heads and norm_eps is not None, options["rngs"]
        self.norm = LayerNorm(width, norm_eps or 0.0, rngs=rngs) if normed else None
        self.attention = Attention(width, heads, **options) if heads else None
        self.mixer = None if heads else Conv(width, width, 3, **options)
        self.conv = Conv(width, width, 7, **options)
        self.mlp = Mlp(width, mlp_dim, "gelu", **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.attention is None:
            assert self.mixer is not None
            x = self.mixer(x)
        else:
            tokens = x.reshape(x.shape[0], -1, x.shape[-1])
            tokens = tokens if self.norm is None else self.norm(tokens)
            x = x + self.attention(tokens).reshape(x.shape)
        return x + self.mlp(self.conv(x))


def flops(config: FastViTConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part; depthwise convolutions included."""
    width = config.stem_width
    size = _half(config.image_size)
    stem = 2 * size**2 * 27 * width
    size = _half(size)
    stem += 2 * size**2 * (9 * width + width**2)
    stages = 0.0
    for s in config.stages:
        if s.halve:
            size = _half(size)
            stages += 2 * size**2 * (49 * s.width + s.width**2) + 4 * s.width * s.squeeze
        places = size**2
        stages += 2 * places * 49 * s.width * s.position
        mixer = 2 * places * (4 * s.width**2 + 2 * places * s.width) if s.heads else 0.0
        mixer = mixer or 2 * places * 9 * s.width
        stages += s.depth * (mixer + 2 * places * (49 * s.width + 2 * s.width * s.mlp_dim))
    pool = 2 * size**2 * 9 * config.width + 4 * config.width * config.squeeze
    return {
        "stem": stem,
        "stages": stages,
        "pool": pool,
        "projection": 2 * config.width * embed_dim,
    }


def _half(size: int) -> int:
    """Side length after a padded convolution of stride 2."""
    return (size + 1) // 2
