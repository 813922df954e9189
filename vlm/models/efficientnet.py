"""EfficientNet (Tan and Le, 2019, arXiv:1905.11946): timm's, and ALIGN's (arXiv:2102.05918)."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from vlm.config import EfficientNetConfig, EfficientNetStage
from vlm.models.conv_tower import ConvTower, grid_pool, grid_pool_flops
from vlm.models.projection import projection, projection_flops
from vlm.nn.conv import Conv, FrozenBatchNorm, Squeeze
from vlm.nn.layers import Linear
from vlm.nn.transformer import Execution, run_stacked, stack_blocks


class EfficientNetTower(ConvTower):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: EfficientNetConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.dtype = config, execution.dtype
        same = {"stride": 2, "depthwise": False, "use_bias": False, "edges": (int(c.symmetric), 1)}
        self.stem = Conv(3, c.stem_width, 3, **same, **options)
        self.stem_norm = FrozenBatchNorm(c.stem_width, eps=c.norm_eps)
        inputs = (c.stem_width, *(stage.width for stage in c.stages[:-1]))
        self.stages = nnx.List(
            Stage(i, stage, c.squeeze, norm_eps=c.norm_eps, execution=execution, rngs=rngs)
            for i, stage in zip(inputs, c.stages, strict=True)
        )
        last = c.stages[-1].width
        self.head = Linear(last, c.head_width, use_bias=False, **options) if c.head_width else None
        self.head_norm = FrozenBatchNorm(c.width, eps=c.norm_eps) if c.head_width else None
        self.pool = grid_pool(c, c.width, embed_dim, **options)
        pooled = c.width if self.pool is None else embed_dim
        self.projection = projection(c, pooled, embed_dim, **options)

    def _positions(self, images, keys, intermediates) -> Array:
        x = super()._positions(images, keys, intermediates)
        if self.head is None or self.head_norm is None:
            return x
        return jax.nn.silu(self.head_norm(self.head(x)))

    def _first_layers(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
        return jax.nn.silu(self.stem_norm(self.stem(images)))

    def _pooled(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
        return {"mean": x.mean, "max": x.max}[self.config.pool]((1, 2))


class Stage(nnx.Module):
    """Stage: a first block, then stacked residual blocks."""

    def __init__(
        self,
        inputs: int,
        stage: EfficientNetStage,
        squeeze: float,
        *,
        norm_eps: float,
        execution: Execution,
        rngs: nnx.Rngs,
    ):
        options = {"norm_eps": norm_eps, "dtype": execution.dtype}
        self.first = InvertedBottleneck(
            inputs, stage, squeeze, halve=stage.halve, rngs=rngs, **options
        )

        def block(rngs: nnx.Rngs) -> InvertedBottleneck:
            return InvertedBottleneck(
                stage.width, stage, squeeze, halve=False, rngs=rngs, **options
            )

        self.blocks = stack_blocks(block, stage.depth - 1, rngs) if stage.depth > 1 else None
        self.execution = execution

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        x = self.first(x)
        if self.blocks is None:
            return x
        return run_stacked(self.blocks, x, lambda block, x: x + block(x), self.execution)


class InvertedBottleneck(nnx.Module):
    """Inverted bottleneck: expansion, depthwise convolution, squeeze-and-excitation, projection.

    (arXiv:1801.04381, arXiv:1709.01507.) The first block of a stage may have a stride (`halve`).
    """

    def __init__(
        self,
        inputs: int,
        stage: EfficientNetStage,
        squeeze: float,
        *,
        halve: bool,
        norm_eps: float,
        **options: Any,
    ):
        s = stage
        inside = inputs * s.expand
        expands = s.expand > 1
        self.expand = Linear(inputs, inside, use_bias=False, **options) if expands else None
        self.expand_norm = FrozenBatchNorm(inside, eps=norm_eps) if expands else None
        self.conv = Conv(
            inside,
            inside,
            s.kernel,
            stride=2 if halve else 1,
            edges=(s.kernel // 2 - (halve and not s.symmetric), s.kernel // 2),
            use_bias=False,
            **options,
        )
        self.conv_norm = FrozenBatchNorm(inside, eps=norm_eps)
        # Relative to the block's input, not to the expanded width.
        hidden = max(1, int(inputs * squeeze))
        self.squeeze = Squeeze(inside, hidden, act="silu", **options)
        self.project = Linear(inside, s.width, use_bias=False, **options)
        self.project_norm = FrozenBatchNorm(s.width, eps=norm_eps)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        if self.expand is not None and self.expand_norm is not None:
            x = jax.nn.silu(self.expand_norm(self.expand(x)))
        x = jax.nn.silu(self.conv_norm(self.conv(x)))
        return self.project_norm(self.project(self.squeeze(x)))


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
    last = embed_dim if c.pool.endswith("attention") else c.width
    return {
        "stem": stem,
        "stages": stages + 2 * side**2 * c.stages[-1].width * c.head_width,
        "pool": grid_pool_flops(c, c.width, embed_dim),
        "projection": projection_flops(c, last, embed_dim),
    }
