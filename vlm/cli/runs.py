"""What a run folder remembers of itself, read without JAX."""

import json
import os

from vlm.config import Experiment, from_dict
from vlm.errors import CheckpointError, ConfigError
from vlm.paths import as_path, is_run


def classifier_of(model: str) -> str | None:
    """The file of the classifier that a run has left, if `model` is a run that left one."""
    from vlm.heads.zero_shot import FILE

    file = as_path(model) / FILE
    return os.fspath(file) if file.exists() else None


def experiment_of(model: str) -> Experiment | None:
    """The experiment of a run folder; None for any other model.

    Raises:
        CheckpointError: a run whose config cannot be read.
    """
    if not is_run(folder := as_path(model)):
        return None
    file = folder / "config.json"
    try:
        return from_dict(Experiment, json.loads(file.read_text()))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
