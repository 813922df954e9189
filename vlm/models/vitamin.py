"""ViTamin (arXiv:2404.02132): convolutional stages, then blocks with a gated MLP."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import ViTaminConfig
from vlm.models.layer_flops import projection_flops
from vlm.models.projection import projection
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.layers import LayerNorm
from vlm.nn.transformer import Execution, Transformer
from vlm.nn.vitamin import EXPANSION, ConvStages


class ViTaminTower(nnx.Module):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: ViTaminConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, dtype = config, execution.dtype
        self.config = config
        self.dtype = dtype
        self.stem = ConvStages(
            c.stem_width,
            c.conv_widths,
            c.conv_depths,
            c.width,
            norm_eps=c.norm_eps,
            dtype=dtype,
            rngs=rngs,
        )
        position = None
        if c.position:
            normal = nnx.initializers.normal(c.width**-0.5)
            position = nnx.Param(normal(rngs.params(), (c.tokens(), c.width)))
        self.position = position
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
        self.projection = projection(c, c.width, embed_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images deterministically.

        `intermediates` capture "stem" and the activations of the stack.
        """
        x = self._places(images, keys, intermediates)
        return self._embedding(x.astype(jnp.float32).mean(1))

    def dense(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Embed each position as if it were the pooled image."""
        return self._embedding(self._places(images, None, None).astype(jnp.float32))

    def _places(self, images: Float[Array, "b h w 3"], keys, intermediates: Intermediates | None):
        x = self.stem(images)
        x = x if self.position is None else x + self.position[...].astype(x.dtype)
        return self.transformer(
            capture(intermediates, "stem", x), keys=keys, intermediates=intermediates
        )

    def _embedding(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        x = self.norm(x).astype(self.dtype)
        return x if self.projection is None else self.projection(x)


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
        "projections": c.depth * 2 * tokens * 4 * c.width**2,
        "scores": c.depth * 4 * tokens**2 * c.width,
        "mlp": c.depth * 2 * tokens * 3 * c.width * c.mlp_dim,
        "projection": projection_flops(c, c.width, embed_dim),
    }
