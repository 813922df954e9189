"""Which parameters a step trains: not those of `lock`, `freeze` or the base of an adapter.

A path is the names of a parameter from the model down, such as ("vision", "stem", "kernel").
"""

import re
from collections.abc import Collection, Sequence

from vlm.config import Experiment
from vlm.models import adapters


def is_frozen(experiment: Experiment, path: Sequence[str]) -> bool:
    """Whether `freeze` names a parameter."""
    return any(re.fullmatch(pattern, "/".join(path)) for pattern in experiment.freeze)


def is_trained(
    experiment: Experiment, path: tuple[str, ...], constants: Collection[tuple[str, ...]]
) -> bool:
    """Whether a step trains a parameter of the model; `constants` are none of its parameters."""
    e = experiment
    in_base = e.adapter is not None and not adapters.is_trained(path)
    fixed = in_base or path[0] == e.lock or path in constants
    return not fixed and not is_frozen(e, path)
