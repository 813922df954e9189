"""Tensors in files, read one at a time: safetensors without a memory map, `.npz`, and dicts.

The pages of a memory map count as the process's memory once they are touched, so that loading would
cost twice the checkpoint. Here each tensor, or a range of its rows, is read when it is asked for.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.errors import CheckpointError

# https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@runtime_checkable
class Tensors(Protocol):
    """A checkpoint's tensors by name."""

    where: str  # for messages
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        """A tensor, or its rows `start:stop` along the first axis."""


@dataclass(frozen=True)
class _Entry:
    path: epath.Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsFiles:
    """The tensors of one `.safetensors` file, or of several that share a checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or not in the format; the message names it.
    """

    def __init__(self, paths: Iterable[epath.PathLike]):
        paths = [epath.Path(p) for p in paths]
        self.where = os.fspath(paths[0])
        self._entries: dict[str, _Entry] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            self._entries.update(self._scan(path))
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        entry = self._entries[name]
        shape, offset = entry.shape, entry.offset
        if shape:
            stop = shape[0] if stop is None else stop
            row = math.prod(shape[1:]) * entry.dtype.itemsize
            offset, shape = offset + start * row, (stop - start, *shape[1:])
        size = math.prod(shape) * entry.dtype.itemsize
        with entry.path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise CheckpointError(f"{entry.path} ends inside {name}: copy or download it again")
        return np.frombuffer(data, entry.dtype).reshape(shape)

    def _scan(self, path: epath.Path) -> dict[str, _Entry]:
        try:
            with path.open("rb") as file:
                head = file.read(8)
                if len(head) < 8:
                    raise CheckpointError(f"{path} is truncated: copy or download it again")
                length = struct.unpack("<Q", head)[0]
                if length > _MAX_HEADER:
                    raise CheckpointError(
                        f"{path} is not a safetensors file: it may be a download's error page or "
                        "a Git LFS pointer, so download it again"
                    )
                text = file.read(length)
            total = path.stat().length
        except FileNotFoundError:
            raise CheckpointError(f"there is no {path}: the checkpoint is incomplete") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        if len(text) < length:
            raise CheckpointError(f"{path} is truncated: copy or download it again")
        try:
            header = json.loads(text)
            self.metadata.update(header.pop("__metadata__", {}))
            entries = {name: self._entry(path, 8 + length, spec) for name, spec in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}): get it again") from None
        end = max(
            (e.offset + math.prod(e.shape) * e.dtype.itemsize for e in entries.values()),
            default=0,
        )
        if end > total:
            raise CheckpointError(
                f"{path} is truncated ({total:,} bytes of {end:,}): copy or download it again"
            )
        return entries

    def _entry(self, path: epath.Path, data: int, spec: dict[str, Any]) -> _Entry:
        dtype = DTYPES.get(spec["dtype"])
        if dtype is None:
            raise ValueError(f"a tensor of unknown type {spec['dtype']}")
        begin, end = spec["data_offsets"]
        shape = tuple(spec["shape"])
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"shape {shape} does not fill bytes {begin} to {end}")
        return _Entry(path, data + begin, shape, dtype)


class Shards:
    """The tensors of several files that share a checkpoint."""

    def __init__(self, files: Sequence[Tensors]):
        self.where = files[0].where
        self._files = {name: file for file in files for name in file.shapes}
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        return self._files[name].read(name, start, stop)


class Arrays:
    """Tensors that are in memory already."""

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str):
        self.where = where
        self.arrays = arrays
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        array = np.asarray(self.arrays[name])
        return array[start:stop] if array.ndim else array


def write_safetensors(
    path: epath.PathLike, arrays: Iterable[tuple[str, Any]], metadata: dict[str, str]
) -> str:
    """Write `arrays` one after the other; returns a fingerprint of names and values.

    An array may be anything with `shape` and `dtype` that becomes numpy when asked (a jax array):
    no more than one is converted at a time.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    arrays = list(arrays)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, array in arrays:
        dtype = np.dtype(array.dtype)
        size = math.prod(array.shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start on a multiple of 8 bytes
    digest = hashlib.blake2b(digest_size=16)
    with epath.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, array in arrays:
            data = np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)
            digest.update(name.encode())
            digest.update(data)
            file.write(data)
    return digest.hexdigest()
