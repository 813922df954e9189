"""Fields that a resumed run may change: those that keep its checkpoints valid."""

import dataclasses
from typing import Any

from flax.traverse_util import flatten_dict

from vlm.config import Experiment, to_dict
from vlm.errors import ConfigError

LENGTHS = ("steps", "epochs", "examples", "seconds")

# Fields, or configs with all of their fields. Changing them keeps checkpoints valid.
CHANGEABLE = {
    "mesh",
    "micro_batch_size",
    "remat",
    "scan",
    *LENGTHS,
    "data.workers",
    "data.prefetch",
    "data.cache",
    "optimizer.on_nonfinite",
    "optimizer.max_skipped_in_a_row",
    "optimizer.learning_rate",
    "optimizer.end_learning_rate",
    "optimizer.schedule",
    "optimizer.warmup",
    "optimizer.cooldown",
    "losses",
    "loss_intermediates",
    "callbacks",
    "code",
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
    """Return [before, after] of each field that differs, by its dotted name."""
    old, new = flat_fields(before), flat_fields(after)
    names = sorted(old.keys() | new.keys())
    return {n: [old.get(n), new.get(n)] for n in names if old.get(n) != new.get(n)}


def check_changes(before: Experiment, after: Experiment) -> dict[str, list[Any]]:
    """Return the changes if a resumed run may make them all.

    Raises:
        ConfigError: a change that it may not make; the message names it.
    """
    changes = changes_between(before, after)
    refused = [n for n in changes if n not in CHANGEABLE and n.split(".")[0] not in CHANGEABLE]
    if refused:
        options = ", ".join("--" + name.replace("_", "-") for name in refused)
        raise ConfigError(
            f"a resumed run cannot change {options}, which would make its checkpoints "
            "invalid: start a new run, with --init-from this run to reuse its weights"
        )
    return changes


def without_length(experiment: Experiment) -> Experiment:
    """Return the experiment without its length, so that another kind of length can be set."""
    return dataclasses.replace(experiment, **dict.fromkeys(LENGTHS))


def flat_fields(experiment: Experiment) -> dict[str, Any]:
    """Return all fields by their dotted names."""
    return flatten_dict(to_dict(experiment), sep=".")
