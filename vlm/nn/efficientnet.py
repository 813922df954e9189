"""Layers of EfficientNet (Tan and Le, 2019, arXiv:1905.11946): inverted bottlenecks."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.config import EfficientNetStage, RematPolicy
from vlm.nn.conv import Conv
from vlm.nn.fastvit import Squeeze
from vlm.nn.layers import Linear
from vlm.nn.resnet import FrozenBatchNorm
from vlm.nn.stack import run_stacked
from vlm.nn.transformer import Execution


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
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        s, options = stage, {"dtype": dtype, "rngs": rngs}
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
        self.squeeze = Squeeze(inside, hidden, act=jax.nn.silu, **options)
        self.project = Linear(inside, s.width, use_bias=False, **options)
        self.project_norm = FrozenBatchNorm(s.width, eps=norm_eps)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        if self.expand is not None and self.expand_norm is not None:
            x = jax.nn.silu(self.expand_norm(self.expand(x)))
        x = jax.nn.silu(self.conv_norm(self.conv(x)))
        return self.project_norm(self.project(self.squeeze(x)))


class EfficientNetLayers(nnx.Module):
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
        def block(inputs: int, rngs: nnx.Rngs, *, halve: bool) -> InvertedBottleneck:
            return InvertedBottleneck(
                inputs,
                stage,
                squeeze,
                halve=halve,
                norm_eps=norm_eps,
                dtype=execution.dtype,
                rngs=rngs,
            )

        self.first = block(inputs, rngs, halve=stage.halve)
        self.depth = stage.depth - 1

        @nnx.split_rngs(splits=self.depth)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> InvertedBottleneck:
            return block(stage.width, rngs, halve=False)

        self.blocks = stack(rngs) if self.depth else None
        self.remat: RematPolicy = execution.remat
        self.scan = execution.scan

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        x = self.first(x)
        if self.blocks is None:
            return x
        return run_stacked(
            self.blocks,
            x,
            lambda block, x: x + block(x),
            depth=self.depth,
            remat=self.remat,
            scan=self.scan,
        )
