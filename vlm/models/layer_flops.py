"""Forward FLOPs of layers that several towers share: see `vlm.models.flops` for conventions."""


def block_flops(config, tokens: int) -> dict[str, float]:
    """FLOPs of transformer blocks; `scores` are the attention products without parameters."""
    width = config.width
    products = 2 if getattr(config, "mlp", "plain") == "plain" else 3  # with a gate
    return {
        "projections": config.depth * 2 * tokens * 4 * width**2,
        "scores": config.depth * 2 * 2 * tokens**2 * width,
        "mlp": config.depth * 2 * tokens * products * width * config.mlp_dim,
    }


def map_pool_flops(width: int, mlp_dim: int, tokens: int) -> float:
    """FLOPs of attention pooling: one query, keys and values of all tokens, and an MLP."""
    attention = 2 * (2 * width**2 + 2 * tokens * width**2 + 2 * tokens * width)
    return attention + 2 * 2 * width * mlp_dim


def query_pool_flops(width: int, embed_dim: int, tokens: int) -> float:
    """FLOPs of CoCa's attentional pooler."""
    keys_and_values = 2 * tokens * width * embed_dim
    return 2 * (2 * embed_dim**2 + keys_and_values + 2 * tokens * embed_dim)


def projection_flops(config, width: int, embed_dim: int) -> float:
    """FLOPs of the projection to the embedding space, if there is one."""
    if config.projection == "none":
        return 0.0
    if config.projection == "mlp":
        return 2 * (width + embed_dim) * ((width + embed_dim) // 2)
    return 2 * width * embed_dim
