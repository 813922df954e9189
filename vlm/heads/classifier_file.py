"""The file of a saved classifier: its arrays, how they were made, and by which model.

A `.safetensors` file whose metadata has one entry: what kind of classifier it is, as the key, and
the description as JSON.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import CheckpointError
from vlm.heads.identity import check_identity, identity

Saved = tuple[dict[str, Any], dict[str, np.ndarray]]


def write_classifier(
    file: str | os.PathLike,
    kind: str,
    model: Any,
    about: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Write a classifier of `model`: JSON values about it, and its arrays; never half of it."""
    from safetensors.numpy import save_file

    partial = f"{os.fspath(file)}.partial"
    held = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(held, partial, {kind: json.dumps({**about, **identity(model)})})
    os.replace(partial, file)


@contextlib.contextmanager
def reading_classifier(file: str | os.PathLike, kind: str, model: Any) -> Iterator[Saved]:
    """What `write_classifier` wrote; what goes wrong inside the block is the file's fault.

    Raises:
        CheckpointError: no such file, another file, or one of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as held:
            about = json.loads(held.metadata()[kind])
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        yield about, tensors
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        name = kind.removeprefix("vlm ")
        raise CheckpointError(f"{file} is no {name} ({error}): save it again") from None
    check_identity(about, model, Path(file))


def kind_of_classifier(file: str | os.PathLike) -> str:
    """The kind that a file's classifier is of.

    Raises:
        CheckpointError: no such file, or another file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as held:
            return next(key for key in held.metadata() or {} if key.startswith("vlm "))
    except (OSError, SafetensorError, StopIteration) as error:
        why = f" ({error})" if str(error) else ""
        raise CheckpointError(
            f"{file} is no saved classifier{why}: give the file that a classifier's save wrote"
        ) from None
