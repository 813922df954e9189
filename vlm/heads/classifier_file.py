"""File format of saved classifiers: arrays, their description, and the identity of the model.

A `.safetensors` file whose metadata has one entry: the kind of classifier as the key, and the
description as JSON.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm._json import parse
from vlm.errors import CheckpointError
from vlm.heads.encoder import Encoder
from vlm.heads.model_identity import check_identity, identity

Saved = tuple[dict[str, Any], dict[str, np.ndarray]]


def write_classifier(
    file: str | os.PathLike,
    kind: str,
    model: Encoder,
    about: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Write a classifier of `model` atomically: its description, as JSON values, and its arrays."""
    from safetensors.numpy import save_file

    partial = f"{os.fspath(file)}.partial"
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(arrays, partial, {kind: json.dumps({**about, **identity(model)})})
    os.replace(partial, file)


@contextlib.contextmanager
def reading_classifier(file: str | os.PathLike, kind: str, model: Encoder) -> Iterator[Saved]:
    """Context manager that reads a classifier; errors inside the block become CheckpointErrors.

    Raises:
        CheckpointError: no such file, another file, or one of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as archive:
            about = parse(archive.metadata()[kind])
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        yield about, tensors
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        name = kind.removeprefix("vlm ")
        raise CheckpointError(f"{file} is not a {name} ({error}): save it again") from None
    check_identity(about, model, Path(file))


def kind_of_classifier(file: str | os.PathLike) -> str:
    """Return the kind of classifier in a file.

    Raises:
        CheckpointError: no such file, or another file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as archive:
            return next(key for key in archive.metadata() or {} if key.startswith("vlm "))
    except (OSError, SafetensorError, StopIteration) as error:
        why = f" ({error})" if str(error) else ""
        raise CheckpointError(
            f"{file} is not a saved classifier{why}: give a file written by a classifier's save()"
        ) from None
