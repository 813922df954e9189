"""Evidence of a result: what was measured on what, by hash, and what became of each example."""

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

Samples = dict[str, np.ndarray]  # columns of one row per query


class Hashing:
    """A stream of images that is hashed as it passes: `digest` names the data afterwards."""

    def __init__(self, images: Iterable[Any]):
        self._images, self._hash = images, hashlib.sha256()

    def __iter__(self) -> Iterator[Any]:
        for image in self._images:
            self._hash.update(_content(image))
            yield image

    def digest(self, *texts: Iterable[Any]) -> str:
        """The hash of the images so far, and of texts and targets that go with them."""
        whole = self._hash.copy()
        for values in texts:
            whole.update(json.dumps([str(value) for value in values]).encode())
        return whole.hexdigest()[:32]


def digest(values: Iterable[Any]) -> str:
    """The hash of a list of texts or numbers."""
    return hashlib.sha256(json.dumps([str(v) for v in values]).encode()).hexdigest()[:32]


def model_facts(model: Any) -> dict[str, str]:
    """Weights, inputs and precision of a model, as far as it tells."""
    fingerprint = getattr(model, "fingerprint", None)
    found = {} if fingerprint is None else {"fingerprint": fingerprint}
    return found | input_facts(model)


def input_facts(model: Any) -> dict[str, str]:
    """How a model takes images and texts, as far as it tells; `decode` is its rule for files."""
    facts = {
        part: getattr(getattr(model, part, None), "config", None)
        for part in ("preprocess", "tokenizer")
    }
    facts["decode"] = getattr(facts["preprocess"], "decode", None)
    facts["dtype"] = getattr(getattr(model, "config", None), "dtype", None)
    return {name: str(value) for name, value in facts.items() if value is not None}


def write_samples(path: str | os.PathLike, samples: Mapping[str, np.ndarray]) -> None:
    """Write what became of each query as a Parquet file, local or remote."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(dict(samples)), sink)
    epath.Path(path).write_bytes(sink.getvalue().to_pybytes())


def read_samples(path: str | os.PathLike) -> Samples:
    """Read what `write_samples` wrote.

    Raises:
        CheckpointError: no such file, or another one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        content = epath.Path(path).read_bytes()
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (OSError, pyarrow.ArrowException) as error:
        raise CheckpointError(
            f"{path} holds no samples of an evaluation ({error}): evaluate again with --out FOLDER"
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
