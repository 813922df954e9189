"""Rematerialisation policies: which activations a block saves for its backward pass."""

from typing import Any

import jax

from vlm.config import Code, ImportPath, RematPolicy
from vlm.errors import ConfigError

# Names of activations that a block may save, besides its input: inputs and output of attention, and
# the hidden layer of an MLP before its activation.
PROJECTED, ATTENDED, MLP_HIDDEN = "projected", "attended", "hidden"

# Saved activations by policy; "none" saves everything.
SAVED: dict[RematPolicy, tuple[str, ...] | None] = {
    "none": None,
    "dots": (PROJECTED, ATTENDED, MLP_HIDDEN),
    "dots_no_batch": (PROJECTED, MLP_HIDDEN),
    "full": (),
}

# Cheap operations that are always recomputed. Saving their results would keep the gathered
# parameters of every layer, which `fsdp` avoids.
_MOVES = {
    "linear_call",  # the gather of `vlm.sharding.gathered`
    "sharding_constraint",
    "reshape",
    "transpose",
    "squeeze",
    "broadcast_in_dim",
    "convert_element_type",
}


def checkpoint_policy(name: RematPolicy | ImportPath) -> Any:
    """Return the `jax.checkpoint` policy of that name, or the user's.

    The output projection of attention is always recomputed, since saving it would cost as much.
    """
    if isinstance(name, Code):
        policy = name.load("remat")
        if not callable(policy):
            raise ConfigError(
                f"remat {name} is a {type(policy).__name__}: give a policy such as "
                "jax.checkpoint_policies.dots_saveable"
            )
        return policy
    saved = SAVED[name]
    if saved is None:
        return lambda primitive, *_, **__: primitive.name not in _MOVES
    return jax.checkpoint_policies.save_only_these_names(*saved)


def saved_names(name: RematPolicy | ImportPath) -> tuple[str, ...] | None:
    """Return the activations that a policy saves; None for all, as assumed of the user's."""
    return None if isinstance(name, Code) else SAVED[name]


def recomputed_share(name: RematPolicy | ImportPath, part: str) -> float:
    """Return the fraction of a part's forward FLOPs that the backward pass recomputes.

    `part` is a name of `vlm.models.flops`. No gradient needs a block's last product, so at most
    half of an MLP is recomputed. Of attention's four projections the last is never saved, and
    neither are the attention weights.
    """
    saved = saved_names(name)
    if saved is None:
        return 0.0
    return {
        "projections": 0.25 if PROJECTED in saved else 1.0,
        "scores": 0.5 if ATTENDED in saved else 1.0,
        "mlp": 0.0 if MLP_HIDDEN in saved else 0.5,
    }.get(part, 0.0)
