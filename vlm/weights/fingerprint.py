"""Fingerprint of a model and digests of its parameters.

A digest covers some rows of one tensor, with its name, dtype and shape. One tower, or the shard of
one host, can be verified without reading the rest.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Shaped

from vlm.config import ModelConfig
from vlm.errors import CheckpointError
from vlm.models.dual_encoder import DualEncoder
from vlm.sharding import to_host
from vlm.weights.checkpoint import Checkpoint
from vlm.weights.files import Tensors, part_rows, write_safetensors
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import flat_arrays, read_all

_LENGTH = 32  # hexadecimal digits of SHA-256, which common CPUs compute in hardware

Digests = Mapping[str, Sequence[str]]


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of a checkpoint's model, as if saved as a float32 bundle.

    It covers the whole checkpoint at its own resolution, even if only a part is loaded.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    if checkpoint.fingerprint is not None:
        return checkpoint.fingerprint
    model = abstract_model(checkpoint.config, jnp.float32)
    arrays = read_all(model, checkpoint.rules, checkpoint.tensors, checkpoint.ignored)
    return _fingerprint_of_arrays(arrays, checkpoint.config)


def fingerprint_of_model(model: nnx.Module) -> str:
    """Return the fingerprint of a model; one parameter at a time is copied to the host."""
    arrays = ((name, to_host(array)) for name, array in flat_arrays(model))
    config = model.config if isinstance(model, DualEncoder) else None  # a user's own module
    return _fingerprint_of_arrays(arrays, config)


def _fingerprint_of_arrays(arrays: Iterable[tuple[str, Any]], config: ModelConfig | None) -> str:
    return fingerprint({name: digests(name, np.asarray(x)) for name, x in arrays}, config)


def fingerprint(digests: Digests, config: ModelConfig | None = None) -> str:
    """Return one digest of the digests of all parameters.

    With the config of a model whose embeddings are truncated, it covers their dimensions: the
    weights are those of the full model, and the embeddings are not.
    """
    text = json.dumps(sorted((name, list(parts)) for name, parts in digests.items()))
    if config is not None and config.full_dim is not None:
        text += f" truncated to {config.embed_dim}"
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def digests(name: str, values: Shaped[np.ndarray, "..."]) -> list[str]:
    """Return the digest of each part of a tensor."""
    if not values.ndim:
        return [_digest(name, (), 0, values)]
    rows = part_rows(values.shape)
    return [
        _digest(name, values.shape, start, values[start : start + rows])
        for start in range(0, len(values), rows)
    ]


def write_with_digests(path: epath.Path, arrays: Iterable[tuple[str, Any]]) -> dict[str, list[str]]:
    """Write parameters as a safetensors file, and return their digests."""
    found: dict[str, list[str]] = {}

    def add(name: str, values: np.ndarray) -> None:
        found[name] = digests(name, values)

    write_safetensors(path, arrays, {"format": "vlm"}, add)
    return found


def older_fingerprint(tensors: Tensors) -> str:
    """Return the fingerprint that bundles without digests have; it reads the whole file."""
    digest = hashlib.blake2b(digest_size=16)
    for name, shape in tensors.shapes.items():
        digest.update(name.encode())
        rows = part_rows(shape)
        for start in range(0, shape[0], rows) if shape else [0]:
            values = tensors.read(name, start, min(start + rows, shape[0]) if shape else None)
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class VerifiedTensors:
    """Tensors that are compared with their digests when they are read.

    Raises:
        CheckpointError: from `read`, if a digest differs.
    """

    def __init__(self, tensors: Tensors, digests: Digests, beside: str = "bundle.json"):
        self.beside = beside  # the file that has the digests
        self.where = os.fspath(tensors.where)
        self.shapes = tensors.shapes
        self._tensors, self._digests = tensors, digests

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        shape = self.shapes[name]
        if not shape:
            values = self._tensors.read(name)
            self._check(name, 0, values)
            return values
        rows = part_rows(shape)
        first, last, _ = slice(start, stop).indices(shape[0])
        # Read whole parts, and return the requested rows of them.
        low, high = first // rows * rows, min(-(-last // rows) * rows, shape[0])
        values = self._tensors.read(name, low, high)
        for begin in range(low, high, rows):
            self._check(name, begin, values[begin - low : begin - low + rows])
        return values[first - low : last - low]

    def _check(self, name: str, start: int, values: np.ndarray) -> None:
        shape = self.shapes[name]
        parts, number = self._digests.get(name, ()), start // part_rows(shape)
        if number >= len(parts) or parts[number] != _digest(name, shape, start, values):
            raise CheckpointError(
                f"{name} in {self.where} is not what was saved: the file is damaged, or of another "
                f"model than the {self.beside} beside it; save or copy both again"
            )


def _digest(name: str, shape: tuple[int, ...], start: int, values: np.ndarray) -> str:
    digest = hashlib.sha256(f"{name} {values.dtype} {list(shape)} {start}\n".encode())
    digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:_LENGTH]
