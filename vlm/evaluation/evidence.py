"""Evidence of a result: hashes of model and data, and the outcome of each query."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vlm.errors import CheckpointError
from vlm.heads.encoder import Encoder
from vlm.heads.model_identity import ROUNDING, embedding_facts, stored_facts

Samples = dict[str, np.ndarray]  # columns of one row per query


class Hashing:
    """A stream of images that hashes them; `digest` identifies the data afterwards."""

    def __init__(self, images: Iterable[Any]):
        self._images, self._hash = images, hashlib.sha256()

    def __iter__(self) -> Iterator[Any]:
        for image in self._images:
            self._hash.update(_content(image))
            yield image

    def digest(self, *texts: Iterable[Any]) -> str:
        """Hash the images so far, with their texts and targets."""
        combined = self._hash.copy()
        for values in texts:
            combined.update(json.dumps([str(value) for value in values]).encode())
        return combined.hexdigest()[:32]


def digest(values: Iterable[Any]) -> str:
    """Hash a list of texts or numbers."""
    return Hashing(()).digest(values)


def model_facts(model: Encoder) -> dict[str, str]:
    """Describe weights, inputs and precision of a model; `decode` is its rule for image files."""
    return stored_facts(model) | _decode(model)


def input_facts(model: Encoder) -> dict[str, str]:
    """Describe inputs and precision of a model, without the weights, which change in a run."""
    facts = embedding_facts(model) | _decode(model)
    return {name: fact for name, fact in facts.items() if name not in ROUNDING}


def _decode(model: Encoder) -> dict[str, str]:
    rule = getattr(getattr(getattr(model, "preprocess", None), "config", None), "decode", None)
    return {} if rule is None else {"decode": str(rule)}


def write_samples(path: str | os.PathLike, samples: Mapping[str, np.ndarray]) -> None:
    """Write the outcome of each query as a Parquet file, local or remote."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(dict(samples)), sink)
    epath.Path(path).write_bytes(sink.getvalue().to_pybytes())


def read_samples(path: str | os.PathLike) -> Samples:
    """Read a file of `write_samples`.

    Raises:
        CheckpointError: no such file, or an invalid one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        content = epath.Path(path).read_bytes()
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (OSError, pyarrow.ArrowException) as error:
        raise CheckpointError(
            f"{path} has no samples of an evaluation ({error}): evaluate again with --out FOLDER"
        ) from None
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _content(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        return str((image.mode, image.size)).encode() + image.tobytes()
    if isinstance(image, str | os.PathLike):
        try:
            return Path(os.fspath(image)).read_bytes()
        except OSError:
            return os.fspath(image).encode()
    array = np.asarray(image)
    return str((array.shape, array.dtype)).encode() + array.tobytes()
