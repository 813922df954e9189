"""What stands at the end of a tower: pooling by attention, and the way into the shared space."""

import jax.numpy as jnp
from flax import nnx

from vlm.nn.pooling import MapPool


def projection(
    config, width: int, embed_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Linear | None:
    """The layer from a tower's pooled width to the shared space, or None where they agree."""
    if config.projection == "none":
        return None
    return nnx.Linear(
        width,
        embed_dim,
        use_bias=config.projection == "linear_bias",
        kernel_init=nnx.initializers.normal(width**-0.5),
        dtype=dtype,
        rngs=rngs,
    )


def map_pool(config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> MapPool:
    """The attention pooling of a tower."""
    return MapPool(
        config.width,
        getattr(config, "pool_heads", None) or config.heads,
        getattr(config, "pool_mlp_dim", None) or config.mlp_dim,
        act=config.activation,
        norm_eps=config.norm_eps,
        dtype=dtype,
        rngs=rngs,
    )
