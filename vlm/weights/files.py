"""Tensors in files, read one at a time: safetensors without a memory map, `.npz`, and dicts.

The pages of a memory map count as the process's memory once they are touched, so that loading would
cost twice the checkpoint. Here each tensor, or a range of its rows, is read when it is asked for.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.errors import CheckpointError
from vlm.weights.fields import show

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
# Of the format, but no parameters in themselves: quantised, or complex.
_OTHER_DTYPES = {
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4",
    "U64", "U32", "U16", "C64", "C128",
}  # fmt: skip
_PART = 2**22  # elements
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@runtime_checkable
class Tensors(Protocol):
    """A checkpoint's tensors by name."""

    @property
    def where(self) -> str: ...  # for messages

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    # A tensor, or its rows `start:stop` along the first axis.
    def read(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> Shaped[np.ndarray, "..."]: ...


def part_rows(shape: Sequence[int]) -> int:
    """How many rows of a table are read at a time: a part of some 16 MB, or a single row."""
    return max(1, _PART // max(1, math.prod(shape[1:])))


def read_parameter(
    tensors: Tensors, name: str, start: int = 0, stop: int | None = None
) -> Shaped[np.ndarray, "..."]:
    """`tensors.read`, of what must be parameters.

    Raises:
        CheckpointError: they are not floating-point numbers.
    """
    values = tensors.read(name, start, stop)
    if values.dtype.kind != "f" and values.dtype != ml_dtypes.bfloat16:
        raise CheckpointError(
            f"{tensors.where} has {show(name)} as {values.dtype}, as a quantised model does: get "
            "the model in float32, float16 or bfloat16"
        )
    return values


@dataclass(frozen=True)
class _Entry:
    path: epath.Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


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
            found = self._scan(path)
            if twice := self._entries.keys() & found.keys():
                raise CheckpointError(
                    f"{path} has {show(min(twice))}, which another shard has too: download it again"
                )
            self._entries.update(found)
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
            header = dict(json.loads(text, object_pairs_hook=_pairs))
            for name, value in dict(header.pop("__metadata__", {})).items():
                self.metadata[str(name)] = str(value)
            specs = {name: dict(spec) for name, spec in header.items()}
            entries = {name: self._entry(path, 8 + length, spec) for name, spec in specs.items()}
            end = _check_layout(entries, 8 + length)
        except CheckpointError:
            raise
        except RecursionError:
            raise CheckpointError(f"{path} has a header nested too deep: get it again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error)[:200]
            raise CheckpointError(f"{path} has a damaged header ({reason}): get it again") from None
        if end > total:
            raise CheckpointError(
                f"{path} is truncated ({total:,} bytes of {end:,}): copy or download it again"
            )
        if end < total:
            raise CheckpointError(
                f"{path} has {total - end:,} bytes after its last tensor: copy or download it again"
            )
        return entries

    def _entry(self, path: epath.Path, data: int, spec: dict[str, Any]) -> _Entry:
        kind = spec["dtype"]
        if not isinstance(kind, str) or (kind not in DTYPES and kind not in _OTHER_DTYPES):
            raise ValueError(f"a tensor of unknown type {show(kind)}")
        if kind in _OTHER_DTYPES:
            raise CheckpointError(
                f"{path} holds tensors of type {kind}, which are quantised or not of real numbers: "
                "get the model in float32, float16 or bfloat16"
            )
        dtype = DTYPES[kind]
        numbers = (*spec["data_offsets"], *spec["shape"])
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a size or an offset that is not a whole number")
        begin, end = spec["data_offsets"]
        shape = tuple(spec["shape"])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"shape {show(shape)} does not fill bytes {begin} to {end}")
        return _Entry(path, data + begin, shape, dtype)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{show(twice)} stands twice")
    return values


def _check_layout(entries: dict[str, _Entry], start: int) -> int:
    """Where the last tensor ends; as the format demands, each begins where one before it ended."""
    last = ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < start:
            raise ValueError(f"{show(last)} and {show(name)} overlap")
        if entry.offset > start:
            raise ValueError(f"there is a hole before {show(name)}")
        start, last = entry.offset + entry.size, name
    return start


class Shards:
    """The tensors of several files that share a checkpoint.

    Raises:
        CheckpointError: two files have the same tensor.
    """

    def __init__(self, files: Sequence[Tensors]):
        self.where = files[0].where
        for number, file in enumerate(files):
            for other in files[:number]:
                if twice := file.shapes.keys() & other.shapes.keys():
                    raise CheckpointError(
                        f"{file.where} has {show(min(twice))}, which {other.where} has too: "
                        "download it again"
                    )
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
    path: epath.PathLike,
    arrays: Iterable[tuple[str, Any]],
    metadata: dict[str, str],
    written: Callable[[str, np.ndarray], None] = lambda name, values: None,
) -> None:
    """Write `arrays` one after the other, and call `written` with each.

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
    with epath.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, array in arrays:
            values = np.asarray(array)
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
            written(name, values)
