"""Changes of a resumed run: every change is accepted that keeps its checkpoints valid."""

import dataclasses
import hashlib
import json
from typing import Any

from flax.traverse_util import flatten_dict

from vlm.config import Experiment, to_dict
from vlm.config.resume import changes_between, option_of
from vlm.errors import ConfigError, brief

LENGTHS = ("steps", "epochs", "examples", "seconds")


def check_changes(before: Experiment, after: Experiment) -> dict[str, list[Any]]:
    """Return [before, after] of each changed field if a resumed run may make all changes.

    Raises:
        ConfigError: a change that would make its checkpoints invalid, or that would have no
            effect; the message names it.
    """
    changes = changes_between(before, after)
    reasons: dict[str, list[str]] = {}
    for change in changes:
        if change.effect.refused:
            text = f"{option_of(change.name)} ({brief(change.old)} to {brief(change.new)})"
            reasons.setdefault(change.effect.value, []).append(text)
    if reasons:
        refused = "; nor ".join(f"{', '.join(names)}, {why}" for why, names in reasons.items())
        raise ConfigError(
            f"a resumed run cannot change {refused}: leave that out, or start a new run, with "
            "--init-from this run to reuse its weights"
        )
    return {change.name: [change.old, change.new] for change in changes}


def without_length(experiment: Experiment) -> Experiment:
    """Return the experiment without its length, so that another kind of length can be set."""
    return dataclasses.replace(experiment, **dict.fromkeys(LENGTHS))


def settings_digest(experiment: Experiment) -> str:
    """Return a digest of all settings but `divergence` and `local_checkpoints`.

    Those change no loss.
    """
    fields = to_dict(experiment) | {"divergence": None}
    del fields["local_checkpoints"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def flat_fields(experiment: Experiment) -> dict[str, Any]:
    """Return all fields by their dotted names."""
    return flatten_dict(to_dict(experiment), sep=".")
