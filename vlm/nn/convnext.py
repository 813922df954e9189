"""Layers of ConvNeXt (Liu et al., 2022, arXiv:2201.03545)."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.config import RematPolicy
from vlm.nn.conv import Conv
from vlm.nn.layers import LayerNorm, Mlp, by_rows
from vlm.nn.patches import PatchConv
from vlm.nn.stack import run_stacked
from vlm.nn.transformer import Execution

LAYER_SCALE = 1e-6  # initial value of layer scale


class ConvNeXtBlock(nnx.Module):
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


class ConvNeXtStage(nnx.Module):
    """Stage of stacked blocks of one width, with an optional downsampling layer."""

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        mlp_dim: int,
        *,
        halve: bool,
        norm_eps: float,
        execution: Execution,
        rngs: nnx.Rngs,
    ):
        dtype = execution.dtype
        self.halve_norm = LayerNorm(inputs, norm_eps, rngs=rngs) if halve else None
        self.halve = PatchConv(2, inputs, width, dtype=dtype, rngs=rngs) if halve else None

        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> ConvNeXtBlock:
            return ConvNeXtBlock(width, mlp_dim, norm_eps=norm_eps, dtype=dtype, rngs=rngs)

        self.blocks = stack(rngs)
        self.depth = depth
        self.remat: RematPolicy = execution.remat
        self.scan = execution.scan

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        if self.halve is not None and self.halve_norm is not None:
            x = self.halve(self.halve_norm(x))
        return run_stacked(
            self.blocks,
            x,
            lambda block, x: block(x),
            depth=self.depth,
            remat=self.remat,
            scan=self.scan,
        )
