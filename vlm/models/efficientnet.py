"""EfficientNet without classifier (arXiv:1905.11946): ALIGN's vision tower (arXiv:2102.05918)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from vlm.config import EfficientNetConfig
from vlm.models.layer_flops import projection_flops
from vlm.models.projection import projection
from vlm.nn.conv import Conv
from vlm.nn.efficientnet import EfficientNetLayers
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.resnet import FrozenBatchNorm
from vlm.nn.transformer import Execution


class EfficientNetTower(nnx.Module):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: EfficientNetConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, dtype = config, execution.dtype
        self.config = config
        self.dtype = dtype
        self.stem = Conv(
            3,
            c.stem_width,
            3,
            stride=2,
            depthwise=False,
            edges=(0, 1),
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.stem_norm = FrozenBatchNorm(c.stem_width, eps=c.norm_eps)
        inputs, stages = c.stem_width, []
        options = {"norm_eps": c.norm_eps, "execution": execution, "rngs": rngs}
        for stage in c.stages:
            stages.append(EfficientNetLayers(inputs, stage, c.squeeze, **options))
            inputs = stage.width
        self.stages = nnx.List(stages)
        self.projection = projection(c, c.width, embed_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images deterministically; `intermediates` capture the output of each stage."""
        x = self._places(images, intermediates).astype(jnp.float32)
        x = {"mean": x.mean, "max": x.max}[self.config.pool]((1, 2))
        return self._embedding(x)

    def dense(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Embed each position as if it were the pooled image."""
        x = self._places(images, None)
        return self._embedding(x.reshape(x.shape[0], -1, x.shape[-1]))

    def _places(self, images: Float[Array, "b h w 3"], intermediates: Intermediates | None):
        x = jax.nn.silu(self.stem_norm(self.stem(images.astype(self.dtype))))
        for number, stage in enumerate(self.stages):
            x = capture(intermediates, f"stages/{number}", stage(x))
        return x

    def _embedding(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        return x if self.projection is None else self.projection(x.astype(self.dtype))


def flops(
    config: EfficientNetConfig, embed_dim: int, *, training: bool = False
) -> dict[str, float]:
    """Forward FLOPs of one image, by part: stem, stages and projection."""
    c, (side, *sides) = config, config.sides()
    stem, stages, inputs = 2 * side**2 * 27 * c.stem_width, 0.0, c.stem_width
    for stage, after in zip(c.stages, sides, strict=True):
        for _ in range(stage.depth):
            inside = inputs * stage.expand
            stages += 2 * side**2 * inputs * inside if stage.expand > 1 else 0
            stages += 2 * after**2 * inside * (stage.kernel**2 + stage.width)
            stages += 2 * 2 * inside * max(1, int(inputs * c.squeeze))
            inputs, side = stage.width, after
    return {
        "stem": stem,
        "stages": stages,
        "projection": projection_flops(c, c.width, embed_dim),
    }
