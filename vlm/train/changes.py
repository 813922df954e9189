"""What a resumed run may change: whatever leaves the state of its checkpoint valid."""

import dataclasses
from typing import Any

from vlm.config import Experiment, to_dict
from vlm.errors import ConfigError

LENGTHS = ("steps", "epochs", "examples", "seconds")

# Fields, or all fields of a part. The state in a checkpoint means the same whatever they are.
CHANGEABLE = {
    "mesh",
    "micro_batch_size",
    "remat",
    "scan",
    *LENGTHS,
    "data.workers",
    "data.prefetch",
    "data.cache",
    "optimizer.nonfinite",
    "optimizer.max_skipped_in_a_row",
    "optimizer.learning_rate",
    "optimizer.end_learning_rate",
    "optimizer.schedule",
    "optimizer.warmup",
    "optimizer.cooldown",
    "log_every",
    "eval_every",
    "evals",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_hours",
    "profile",
}


def changes_between(before: Experiment, after: Experiment) -> dict[str, list[Any]]:
    """The fields that differ, by name: [before, after]."""
    old, new = flat_fields(to_dict(before)), flat_fields(to_dict(after))
    names = sorted(old.keys() | new.keys())
    return {n: [old.get(n), new.get(n)] for n in names if old.get(n) != new.get(n)}


def check_changes(before: Experiment, after: Experiment) -> dict[str, list[Any]]:
    """The changes, if a resumed run may make them all.

    Raises:
        ConfigError: one that it may not; the message names it.
    """
    changes = changes_between(before, after)
    refused = [name for name in changes if not _may_change(name)]
    if refused:
        options = ", ".join("--" + name.replace("_", "-") for name in refused)
        raise ConfigError(
            f"a resumed run cannot change {options}: what its checkpoints hold would mean "
            "something else; start a new run, with --init-from this one if its weights are wanted"
        )
    return changes


def without_length(experiment: Experiment) -> Experiment:
    """The experiment before a new length is put in, for it has one alone."""
    return dataclasses.replace(experiment, **dict.fromkeys(LENGTHS))


def _may_change(name: str) -> bool:
    return name in CHANGEABLE or name.split(".")[0] in CHANGEABLE


def flat_fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested dicts by their dotted names."""
    out = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= flat_fields(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
