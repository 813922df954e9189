"""MobileCLIP's vision tower: FastViT, reparameterised (arXiv:2303.14189, arXiv:2311.17049)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import FastViTConfig
from vlm.nn.conv import Conv
from vlm.nn.fastvit import Squeeze, Stage
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.layers import Linear, gelu
from vlm.nn.transformer import Execution


class FastViTTower(nnx.Module):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: FastViTConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c = config
        options = {"dtype": execution.dtype, "rngs": rngs}
        self.config = config
        self.dtype = execution.dtype
        inputs = c.stem_width
        self.stem = Conv(3, inputs, 3, stride=2, depthwise=False, **options)
        self.stem_halve = Conv(inputs, inputs, 3, stride=2, **options)
        self.stem_project = Linear(inputs, inputs, **options)
        stages = []
        for stage in c.stages:
            stages.append(Stage(stage, inputs, norm_eps=c.norm_eps, **options))
            inputs = stage.width
        self.stages = nnx.List(stages)
        self.last = Conv(inputs, c.width, 3, **options)
        self.squeeze = Squeeze(c.width, c.squeeze, **options)
        self.projection = Linear(c.width, embed_dim, **options)

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images deterministically; `intermediates` capture the output of each stage."""
        x = self._places(images, intermediates)
        return self.projection(x.astype(jnp.float32).mean((1, 2)).astype(self.dtype))

    def dense(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Embed each position as if it were the pooled image."""
        x = self._places(images, None)
        return self.projection(x.reshape(x.shape[0], -1, x.shape[-1]))

    def _places(self, images: Float[Array, "b h w 3"], intermediates: Intermediates | None):
        x = gelu(self.stem(images.astype(self.dtype)))
        x = gelu(self.stem_project(gelu(self.stem_halve(x))))
        for number, stage in enumerate(self.stages):
            x = capture(intermediates, f"stages/{number}", stage(x))
        return capture(
            intermediates, f"stages/{len(self.stages)}", gelu(self.squeeze(self.last(x)))
        )


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
