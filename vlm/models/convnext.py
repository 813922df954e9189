"""ConvNeXt (arXiv:2201.03545) of LAION's CLIP models, as in timm and open_clip."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import ConvNeXtConfig
from vlm.nn.convnext import ConvNeXtStage
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.layers import LayerNorm, Linear, gelu
from vlm.nn.patches import PatchConv
from vlm.nn.transformer import Execution


class ConvNeXtTower(nnx.Module):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: ConvNeXtConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, dtype = config, execution.dtype
        self.config = config
        self.dtype = dtype
        self.stem = PatchConv(4, 3, c.widths[0], dtype=dtype, rngs=rngs)
        self.stem_norm = LayerNorm(c.widths[0], c.norm_eps, rngs=rngs)
        stages, inputs = [], c.widths[0]
        for number, (width, depth, mlp_dim) in enumerate(
            zip(c.widths, c.depths, c.mlp_dims, strict=True)
        ):
            stage = ConvNeXtStage(
                inputs,
                width,
                depth,
                mlp_dim,
                halve=number > 0,
                norm_eps=c.norm_eps,
                execution=execution,
                rngs=rngs,
            )
            stages.append(stage)
            inputs = width
        self.stages = nnx.List(stages)
        self.norm = LayerNorm(inputs, c.norm_eps, rngs=rngs)
        options = {"dtype": dtype, "rngs": rngs, "use_bias": False}
        hidden, projection = None, None
        if c.projection == "mlp":
            hidden = Linear(inputs, 2 * embed_dim, dtype=dtype, rngs=rngs)
            projection = Linear(2 * embed_dim, embed_dim, **options)
        elif c.projection == "linear":
            projection = Linear(inputs, embed_dim, **options)
        self.hidden, self.projection = hidden, projection

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images deterministically; `intermediates` capture the output of each stage."""
        x = self._places(images, intermediates)
        return self._embedding(x.astype(jnp.float32).mean((1, 2)))

    def dense(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Embed each position as if it were the pooled image."""
        x = self._places(images, None)
        return self._embedding(x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32))

    def _places(self, images: Float[Array, "b h w 3"], intermediates: Intermediates | None):
        x = self.stem_norm(self.stem(images.astype(self.dtype)))
        for number, stage in enumerate(self.stages):
            x = capture(intermediates, f"stages/{number}", stage(x))
        return x

    def _embedding(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        x = self.norm(x).astype(self.dtype)
        if self.hidden is not None:
            x = gelu(self.hidden(x))
        return x if self.projection is None else self.projection(x)


def flops(config: ConvNeXtConfig, embed_dim: int, *, training: bool = False) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, stages, mlp and projection."""
    c, size = config, config.image_size // 4
    stem = 2 * size**2 * 48 * c.widths[0]
    stages, mlp, inputs = 0.0, 0.0, c.widths[0]
    for number, (width, depth, mlp_dim) in enumerate(
        zip(c.widths, c.depths, c.mlp_dims, strict=True)
    ):
        if number:
            size //= 2
            stages += 2 * size**2 * 4 * inputs * width
        stages += depth * 2 * size**2 * 49 * width
        mlp += depth * 2 * size**2 * 2 * width * mlp_dim
        inputs = width
    projection = {"none": 0, "linear": inputs, "mlp": 2 * (inputs + embed_dim)}[c.projection]
    return {"stem": stem, "stages": stages, "mlp": mlp, "projection": 2 * projection * embed_dim}
