"""Which model a checkpoint holds, whatever its format: the fingerprint of its parameters."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm.weights.building import abstract_model
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.digests import digests, fingerprint
from vlm.weights.rules import read_all


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """The fingerprint that the model of a checkpoint has, or would have as a bundle in float32.

    It is that of the whole checkpoint at its own resolution, however much of it is loaded.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    if checkpoint.fingerprint is not None:
        return checkpoint.fingerprint
    model = abstract_model(checkpoint.config, jnp.float32)
    arrays = read_all(model, checkpoint.rules, checkpoint.tensors, checkpoint.ignored)
    return fingerprint_of_arrays(arrays)


def fingerprint_of_arrays(arrays: Iterable[tuple[str, Any]]) -> str:
    """The fingerprint of parameters by their names, of which one at a time is on the host."""
    return fingerprint({name: digests(name, np.asarray(array)) for name, array in arrays})
