"""Contents of a run folder, read without JAX."""

import json
import os

from vlm.config import Experiment, from_dict
from vlm.errors import CheckpointError, ConfigError
from vlm.paths import as_path, is_run


def classifier_of(model: str) -> str | None:
    """Return the file of a run's classifier; None without one, or if `model` is not a run."""
    from vlm.heads.zero_shot import FILE

    file = as_path(model) / FILE
    return os.fspath(file) if file.exists() else None


def experiment_of(model: str) -> Experiment | None:
    """Return the experiment of a run folder; None for any other model.

    Raises:
        CheckpointError: the run's config cannot be read.
    """
    if not is_run(folder := as_path(model)):
        return None
    file = folder / "config.json"
    try:
        return from_dict(Experiment, json.loads(file.read_text()))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
