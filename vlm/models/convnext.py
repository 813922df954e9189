"""ConvNeXt (Liu et al., 2022, arXiv:2201.03545) of LAION's CLIPs, as in timm and open_clip."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.config import ConvNeXtConfig
from vlm.models.conv_tower import ConvTower, grid_pool, grid_pool_flops
from vlm.nn.conv import Conv
from vlm.nn.layers import LayerNorm, Linear, Mlp, by_rows, gelu
from vlm.nn.patches import PatchConv
from vlm.nn.transformer import Execution, run_stacked, stack_blocks

LAYER_SCALE = 1e-6  # initial value of layer scale


class ConvNeXtTower(ConvTower):
    """Map normalised images to embeddings of `embed_dim` dimensions (not unit norm)."""

    def __init__(
        self, config: ConvNeXtConfig, embed_dim: int, *, execution: Execution, rngs: nnx.Rngs
    ):
        c, options = config, {"dtype": execution.dtype, "rngs": rngs}
        self.config, self.dtype = config, execution.dtype
        self.stem = PatchConv(4, 3, c.widths[0], **options)
        self.stem_norm = LayerNorm(c.widths[0], c.norm_eps, rngs=rngs)
        inputs = (None, *c.widths[:-1])  # the first stage does not halve
        sizes = zip(inputs, c.widths, c.depths, c.mlp_dims, strict=True)
        self.stages = nnx.List(
            Stage(*size, norm_eps=c.norm_eps, execution=execution, rngs=rngs) for size in sizes
        )
        width = c.widths[-1]
        self.norm = LayerNorm(width, c.norm_eps, rngs=rngs)
        self.pool = grid_pool(c, width, embed_dim, **options)
        pooled = width if self.pool is None else embed_dim
        mlp, hidden = c.projection == "mlp", 2 * embed_dim
        self.hidden = Linear(pooled, hidden, **options) if mlp else None
        last, bias = hidden if mlp else pooled, c.projection == "linear_bias"
        projects = c.projection != "none"
        self.projection = Linear(last, embed_dim, use_bias=bias, **options) if projects else None

    def _first_layers(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
        return self.stem_norm(self.stem(images))

    def _positions(self, images, keys, intermediates) -> Array:
        x = super()._positions(images, keys, intermediates)
        return x if self.pool is None else self.norm(x)

    def _embedding(self, x: Float[Array, "*b c"]) -> Float[Array, "*b e"]:
        x = (self.norm(x) if self.pool is None else x).astype(self.dtype)
        return super()._embedding(x if self.hidden is None else gelu(self.hidden(x)))


class Stage(nnx.Module):
    """Stage of stacked blocks of one width, after a downsampling layer unless `inputs` is None."""

    def __init__(
        self,
        inputs: int | None,
        width: int,
        depth: int,
        mlp_dim: int,
        *,
        norm_eps: float,
        execution: Execution,
        rngs: nnx.Rngs,
    ):
        dtype = execution.dtype
        self.halve_norm = None if inputs is None else LayerNorm(inputs, norm_eps, rngs=rngs)
        self.halve = None if inputs is None else PatchConv(2, inputs, width, dtype=dtype, rngs=rngs)

        def block(rngs: nnx.Rngs) -> Block:
            return Block(width, mlp_dim, norm_eps=norm_eps, dtype=dtype, rngs=rngs)

        self.blocks = stack_blocks(block, depth, rngs)
        self.execution = execution

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        if self.halve is not None and self.halve_norm is not None:
            x = self.halve(self.halve_norm(x))
        return run_stacked(self.blocks, x, lambda block, x: block(x), self.execution)


class Block(nnx.Module):
    """Residual block: depthwise 7x7 convolution and channel MLP."""

    def __init__(
        self, width: int, mlp_dim: int, *, norm_eps: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv = Conv(width, width, 7, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, norm_eps, rngs=rngs)
        self.mlp = Mlp(width, mlp_dim, "gelu", dtype=dtype, rngs=rngs)
        self.scale = nnx.Param(jnp.full(width, LAYER_SCALE))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = by_rows(self.mlp, self.norm(self.conv(x)))
        return x + y * self.scale[...].astype(y.dtype)


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
    last = inputs if c.pool == "mean" else embed_dim
    sizes = {"none": 0, "linear": last, "linear_bias": last, "mlp": 2 * (last + embed_dim)}
    return {
        "stem": stem,
        "stages": stages,
        "mlp": mlp,
        "pool": grid_pool_flops(c, inputs, embed_dim),
        "projection": 2 * sizes[c.projection] * embed_dim,
    }
