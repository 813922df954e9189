"""Attention pooling and projection at the end of a tower."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlm.errors import check_choice
from vlm.nn.layers import Linear, gelu
from vlm.nn.pooling import MapPool

_KINDS = ("none", "linear", "linear_bias", "mlp", "mlp_bias", "mlp_relu")


def projection(
    config, width: int, embed_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Module | None:
    """Make the projection from the pooled width to the embedding space; None if there is none."""
    check_choice("projection", config.projection, _KINDS)
    if config.projection == "none":
        return None
    if config.projection == "mlp_relu":
        hidden, options = config.projection_dim, {"bias": True, "out_bias": True}
        return MlpProjection(
            width, hidden, embed_dim, act=jax.nn.relu, **options, dtype=dtype, rngs=rngs
        )
    if config.projection in ("mlp", "mlp_bias"):
        hidden, bias = _hidden(config, width, embed_dim), config.projection == "mlp_bias"
        return MlpProjection(width, hidden, embed_dim, bias=bias, dtype=dtype, rngs=rngs)
    return Linear(
        width,
        embed_dim,
        use_bias=config.projection == "linear_bias",
        kernel_init=nnx.initializers.normal(width**-0.5),
        dtype=dtype,
        rngs=rngs,
    )


def _hidden(config, width: int, embed_dim: int) -> int:
    """Width of the hidden layer: open_clip's for texts, timm's for images."""
    if config.projection == "mlp_relu":
        return config.projection_dim
    return (width + embed_dim) // 2 if config.projection == "mlp" else 2 * embed_dim


class MlpProjection(nnx.Module):
    """Two linear layers with an activation between them, from one width to another."""

    def __init__(
        self,
        width: int,
        hidden: int,
        embed_dim: int,
        *,
        act: Callable[[Array], Array] = gelu,
        bias: bool,
        out_bias: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.up = Linear(width, hidden, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, embed_dim, use_bias=out_bias, dtype=dtype, rngs=rngs)
        self.act = act

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        return self.down(self.act(self.up(x)))


def map_pool(config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> MapPool:
    """Make the attention pooling of a tower."""
    return MapPool(
        config.width,
        getattr(config, "pool_heads", None) or config.heads,
        getattr(config, "pool_mlp_dim", None) or config.mlp_dim,
        act=config.activation,
        kind="swiglu_plain" if config.pool == "class_map" else "plain",
        add_to_first=config.pool == "class_map",
        norm_eps=config.norm_eps,
        dtype=dtype,
        rngs=rngs,
    )


def projection_flops(config, width: int, embed_dim: int) -> float:
    """FLOPs of the projection to the embedding space, if there is one."""
    if config.projection == "none":
        return 0.0
    if config.projection in ("mlp", "mlp_bias", "mlp_relu"):
        return 2 * (width + embed_dim) * _hidden(config, width, embed_dim)
    return 2 * width * embed_dim
