"""Base of convolutional towers: the loop over stages, the pool and the embedding of an image."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vlm.config.bounds import GRID_POOLS, POOL_HEAD
from vlm.nn.attention import Attention
from vlm.nn.auto_axes import auto_axes
from vlm.nn.intermediates import Intermediates, capture
from vlm.nn.positions import grid_rotation


class ConvTower(nnx.Module):
    """Map normalised images to embeddings (not unit norm): a stem, stages, a mean, a projection.

    A tower sets `projection` and `dtype`, and `stages` with `_first_layers`, or its `_positions`.
    It may set `pool`, an attention in place of the mean.
    """

    stages: Any
    pool: "GridPool | None" = None
    projection: Any  # None: the tower has none
    dtype: Any

    @auto_axes
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        intermediates: Intermediates | None = None,
    ) -> Float[Array, "b e"]:
        """Embed images deterministically; `intermediates` capture the output of each stage."""
        x = self._positions(images, keys, intermediates).astype(jnp.float32)
        return self._embedding(self._pooled(x) if self.pool is None else self.pool(x))

    @auto_axes
    def dense(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n e"]:
        """Embed each position as if it were the pooled image."""
        x = self._positions(images, None, None).astype(jnp.float32)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return self._embedding(x if self.pool is None else self.pool.dense(x))

    def _positions(self, images, keys, intermediates: Intermediates | None) -> Array:
        """Run the stages: an array of (batch, *positions, channels)."""
        x = self._first_layers(images.astype(self.dtype))
        for number, stage in enumerate(self.stages):
            x = capture(intermediates, f"stages/{number}", stage(x))
        return x

    def _first_layers(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
        raise NotImplementedError

    def _pooled(self, x: Float[Array, "b *n c"]) -> Float[Array, "b c"]:
        return x.mean(tuple(range(1, x.ndim - 1)))

    def _embedding(self, x: Float[Array, "*b c"]) -> Float[Array, "*b e"]:
        return x if self.projection is None else self.projection(x.astype(self.dtype))


class GridPool(nnx.Module):
    """Attention pooling of a grid of positions: their mean attends to them and itself.

    It has learned positions, as in OpenAI's ResNets, or rotary ones (timm's RotAttentionPool2d).
    """

    def __init__(
        self,
        width: int,
        embed_dim: int,
        side: int,
        *,
        rotary: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        normal, heads = nnx.initializers.normal(width**-0.5), width // POOL_HEAD
        shape = (side**2 + 1, width)
        self.position = None if rotary else nnx.Param(normal(rngs.params(), shape))
        self.attention = Attention(width, heads, output_width=embed_dim, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        side, x = x.shape[1], x.reshape(x.shape[0], -1, x.shape[-1]).astype(self.dtype)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        if self.position is not None:
            x = x + self.position[...].astype(x.dtype)
            return self.attention(x[:, :1], x)[:, 0]
        rotation = grid_rotation(side, POOL_HEAD, first=0, before=1, span=7, rows_first=True)
        return self.attention(x, rotation=rotation)[:, 0]

    def dense(self, x: Float[Array, "b n c"]) -> Float[Array, "b n e"]:
        """Let each position attend only to itself (MaskCLIP, arXiv:2112.01071)."""
        if self.position is not None:
            x = x + self.position[...].astype(x.dtype)[1:]
        return self.attention(x.reshape(-1, 1, x.shape[-1])).reshape(*x.shape[:2], -1)


def grid_pool(
    config: Any, width: int, embed_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> GridPool | None:
    """Make the attention pool of a convolutional tower; None for another pooling."""
    if config.pool not in GRID_POOLS:
        return None
    side, rotary = round(config.tokens() ** 0.5), config.pool == "rotary_attention"
    return GridPool(width, embed_dim, side, rotary=rotary, dtype=dtype, rngs=rngs)


def grid_pool_flops(config: Any, width: int, embed_dim: int) -> float:
    """FLOPs of the attention pool, if there is one; rotary positions need all queries."""
    if config.pool not in GRID_POOLS:
        return 0.0
    tokens = config.tokens() + 1
    queries = tokens if config.pool == "rotary_attention" else 1
    projections = (queries + 2 * tokens) * width**2 + queries * width * embed_dim
    return 2 * (projections + 2 * queries * tokens * width)
