"""Digests of a bundle's parameters, so that whatever is read of them is what was written.

A digest is of some rows of one tensor, with its name, type and shape: a tower, or a host's share of
a table, is checked without reading the rest.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from vlm.errors import CheckpointError
from vlm.weights.files import Tensors, part_rows

_LENGTH = 32  # hexadecimal digits of SHA-256, which common processors compute by themselves

Digests = Mapping[str, Sequence[str]]


def digests(name: str, values: Shaped[np.ndarray, "..."]) -> list[str]:
    """The digest of each part of a tensor."""
    rows = part_rows(values.shape)
    starts = range(0, len(values), rows) if values.ndim else [0]
    return [
        _digest(name, values.shape, start, values[start : start + rows] if values.ndim else values)
        for start in starts
    ]


def fingerprint(found: Digests) -> str:
    """One digest for all parameters."""
    text = json.dumps(sorted((name, list(parts)) for name, parts in found.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def older_fingerprint(tensors: Tensors) -> str:
    """That of bundles from before there were digests, for which the whole file is read."""
    digest = hashlib.blake2b(digest_size=16)
    for name, shape in tensors.shapes.items():
        digest.update(name.encode())
        rows = part_rows(shape)
        for start in range(0, shape[0], rows) if shape else [0]:
            values = tensors.read(name, start, min(start + rows, shape[0]) if shape else None)
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Checked:
    """Tensors that are compared with their digests as they are read.

    Raises:
        CheckpointError: from `read`, where they differ.
    """

    def __init__(self, tensors: Tensors, found: Digests, beside: str = "bundle.json"):
        self.beside = beside  # the file that has the digests
        self.where = os.fspath(tensors.where)
        self.shapes = tensors.shapes
        self._tensors, self._digests = tensors, found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        shape = self.shapes[name]
        if not shape:
            values = self._tensors.read(name)
            self._check(name, 0, values)
            return values
        rows = part_rows(shape)
        first, last, _ = slice(start, stop).indices(shape[0])
        # Whole parts are read, and what is asked for is cut from them.
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
