"""Rematerialisation: what a block keeps for its backward pass, and what it computes again."""

import jax

from vlm.config import RematPolicy

# Names of what a block may keep, beside its input: what goes into attention and comes out of it,
# and the hidden layer of an MLP before its activation.
PROJECTED, ATTENDED, MLP_HIDDEN = "projected", "attended", "hidden"

# By policy; "none" keeps everything, so that nothing is computed again.
KEPT: dict[RematPolicy, tuple[str, ...] | None] = {
    "none": None,
    "dots": (PROJECTED, ATTENDED, MLP_HIDDEN),
    "dots_no_batch": (PROJECTED, MLP_HIDDEN),
    "full": (),
}

# What is cheap to do again. Kept, it would hold every layer's parameters whole, which is what a
# mesh with `fsdp` is there to avoid.
_MOVES = {
    "linear_call",  # the gather of `vlm.sharding.gathered`
    "sharding_constraint",
    "reshape",
    "transpose",
    "squeeze",
    "broadcast_in_dim",
    "convert_element_type",
}


def checkpoint_policy(name: RematPolicy):
    """The policy of `jax.checkpoint` of that name.

    The product after attention is always done again: its result would cost as much to keep.
    """
    kept = KEPT[name]
    if kept is None:
        return lambda primitive, *_, **__: primitive.name not in _MOVES
    return jax.checkpoint_policies.save_only_these_names(*kept)


def recomputed_share(name: RematPolicy, part: str) -> float:
    """The share of a part's forward FLOPs that the backward pass computes again.

    `part` is one of a block's as `vlm.models.flops` names them. No gradient needs a block's last
    product, so at most half an MLP is done again; of attention's four projections the last one is
    never kept, and of its two products the weights are not.
    """
    kept = KEPT[name]
    if kept is None:
        return 0.0
    return {
        "projections": 0.25 if PROJECTED in kept else 1.0,
        "scores": 0.5 if ATTENDED in kept else 1.0,
        "mlp": 0.0 if MLP_HIDDEN in kept else 0.5,
    }.get(part, 0.0)
