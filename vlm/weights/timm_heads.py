"""Pools and projections that open_clip puts on timm's convolutional and windowed trunks."""

from typing import Any

from vlm.errors import CheckpointError
from vlm.weights.layers import fused, linear, out
from vlm.weights.rules import Rule, Shapes

_PROJECTIONS = ("none", "linear", "mlp")
# Pairs of timm_pool and timm_proj: the mean, and attention over the positions. Without a
# projection of its own, the mean is followed by timm's classifier.
MEANS = {(pool, proj) for pool in ("", "avg") for proj in _PROJECTIONS} | {("avg", None)}
ALL = MEANS | {(pool, p) for pool in ("abs_attn", "rot_attn") for p in (None, *_PROJECTIONS)}
_POOLS: dict[str, Any] = {
    "": "mean", "avg": "mean", "abs_attn": "attention", "rot_attn": "rotary_attention"
}  # fmt: skip
_POOL, _PROJECTION, _MLP = "visual.head.pool", "visual.head.proj", "visual.head.mlp"


def pool_of(pool: str) -> Any:
    """Our name of a `timm_pool`."""
    return _POOLS[pool]


def projection_of(proj: str | None, shapes: Shapes, pool: str = "") -> Any:
    """Our name of a `timm_proj`, with a bias if the tensors have one."""
    bias = f"{_PROJECTION}.bias" in shapes
    attends = pool_of(pool) != "mean"  # its last layer is the projection
    names = {
        "linear": "linear_bias" if bias else "linear",
        "mlp": "mlp_bias",
        "none": "none",
        None: "none" if attends else "linear_bias",
    }
    return names[proj]


def options(pool: str, projection: str) -> dict[str, Any]:
    """Fields of a `vision_cfg` for our pool and projection.

    Raises:
        CheckpointError: a pool that open_clip does not support.
    """
    theirs = {ours: name for name, ours in reversed(_POOLS.items())}
    if pool not in theirs:
        raise CheckpointError(
            f"open_clip has no place for vision.pool {pool!r} of this tower: save the model as a "
            "vlm bundle instead"
        )
    proj = {"none": "none", "linear": "linear", "linear_bias": "linear", "mlp_bias": "mlp"}
    bias = {"timm_proj_bias": True} if projection == "linear_bias" else {}
    return {"timm_pool": theirs[pool], "timm_proj": proj[projection], **bias}


def pool_rules(pool: str) -> list[Rule]:
    """Rules of the attention pool, if it is one."""
    if pool == "mean":
        return []
    position = [Rule(f"{_POOL}.pos_embed", "vision.pool.position")]
    return [
        *(position if pool == "attention" else []),
        *fused(f"{_POOL}.qkv.", "vision.pool.attention", "query", "key", "value"),
        *out(f"{_POOL}.proj", "vision.pool.attention.out"),
    ]


def projection_rules(projection: str, classifier: str, shapes: Shapes) -> list[Rule]:
    """Rules of the projection: open_clip's, or timm's `classifier`."""
    if projection == "none":
        return []
    if projection == "mlp_bias":
        return [
            *linear(f"{_MLP}.fc1", "vision.projection.up"),
            *linear(f"{_MLP}.fc2", "vision.projection.down", bias=False),
        ]
    biased = projection == "linear_bias"
    own = biased and f"{classifier}.weight" in shapes
    return linear(classifier if own else _PROJECTION, "vision.projection", bias=biased)
