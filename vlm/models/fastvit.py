"""MobileCLIP's image tower: FastViT, reparameterised (arXiv:2303.14189, arXiv:2311.17049)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import VisionConfig
from vlm.nn.fastvit import Conv, Squeeze, Stage
from vlm.nn.layers import gelu
from vlm.nn.transformer import Execution


class FastViTTower(nnx.Module):
    """Normalised images to embeddings of `embed_dim` dimensions (not yet of unit norm).

    `config.width` is that of the last convolution, whose mean over the image is projected.
    """

    def __init__(
        self, config: VisionConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, parts = config, config.fastvit
        options = {"dtype": execution.dtype, "rngs": rngs}
        self.config = config
        self.dtype = execution.dtype
        inputs = parts.stem_width
        self.stem = Conv(3, inputs, 3, stride=2, depthwise=False, **options)
        self.stem_halve = Conv(inputs, inputs, 3, stride=2, **options)
        self.stem_project = nnx.Linear(inputs, inputs, **options)
        stages = []
        for stage in parts.stages:
            stages.append(Stage(stage, inputs, norm_eps=c.norm_eps, **options))
            inputs = stage.width
        self.stages = nnx.List(stages)
        self.last = Conv(inputs, c.width, 3, **options)
        self.squeeze = Squeeze(c.width, parts.squeeze, **options)
        self.projection = nnx.Linear(c.width, embed_dim, **options)

    def __call__(
        self, images: Float[Array, "b h w 3"], *, keys: Key[Array, "b"] | None = None
    ) -> Float[Array, "b e"]:
        """Embed images; nothing here is random."""
        x = gelu(self.stem(images.astype(self.dtype)))
        x = gelu(self.stem_project(gelu(self.stem_halve(x))))
        for stage in self.stages:
            x = stage(x)
        x = gelu(self.squeeze(self.last(x)))
        return self.projection(x.astype(jnp.float32).mean((1, 2)).astype(self.dtype))
