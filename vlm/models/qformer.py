"""Q-Former (Li et al., 2023, arXiv:2301.12597): learned queries that attend to an image."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlm.config import QFormerConfig
from vlm.nn.attention import Attention
from vlm.nn.layers import LayerNorm, Mlp
from vlm.nn.transformer import block_flops


class QFormer(nnx.Module):
    """Map the tokens of an image, of `context_width`, to one vector for each learned query."""

    def __init__(self, config: QFormerConfig, context_width: int, *, dtype: Any, rngs: nnx.Rngs):
        c = config
        start = nnx.initializers.normal(0.02)
        self.queries = nnx.Param(start(rngs.params(), (c.queries, c.width)))
        self.norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.blocks = nnx.List(
            QFormerBlock(
                c,
                None if number % c.cross_every else context_width,
                dtype=dtype,
                rngs=rngs,
            )
            for number in range(c.depth)
        )

    def __call__(self, context: Float[Array, "b n d"]) -> Float[Array, "b q e"]:
        x = self.norm(self.queries[...].astype(context.dtype))
        x = jnp.broadcast_to(x, (len(context), *x.shape))
        for block in self.blocks:
            x = block(x, context)
        return x


class QFormerBlock(nnx.Module):
    """BERT block with cross-attention to the image; without, if `context_width` is None."""

    def __init__(self, c: QFormerConfig, context_width: int | None, *, dtype: Any, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        cross = context_width is not None
        self.attention = Attention(c.width, c.heads, **options)
        self.attention_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)
        self.cross_attention = (
            Attention(c.width, c.heads, context_width=context_width, **options) if cross else None
        )
        self.cross_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs) if cross else None
        self.mlp = Mlp(c.width, c.mlp_dim, c.activation, **options)
        self.mlp_norm = LayerNorm(c.width, c.norm_eps, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b q e"], context: Float[Array, "b n d"]
    ) -> Float[Array, "b q e"]:
        x = self.attention_norm(x + self.attention(x))
        if self.cross_attention is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.cross_attention(x, context))
        return self.mlp_norm(x + self.mlp(x))


def qformer_flops(c: QFormerConfig, context_width: int, tokens: int) -> float:
    """FLOPs of the blocks for an image of so many tokens."""
    cross = 2 * c.queries * c.width**2 + 2 * tokens * context_width * c.width
    cross += 2 * c.queries * tokens * c.width
    return sum(block_flops(c, c.queries).values()) + 2.0 * -(-c.depth // c.cross_every) * cross
