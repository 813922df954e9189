"""Tensors in files, read one at a time: safetensors without a memory map, and arrays in memory.

The `safetensors` library maps local files into memory and writes a file from a dict of all its
tensors. Here rows of a tensor are read on request, also from buckets, and tensors are written one
after the other. The touched pages of a memory map count as memory of the process, so that loading
would need twice the size of the checkpoint.
"""

import collections
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm._json import parse
from vlm.data.storage import RemoteInfo, open_file, remote_info
from vlm.errors import CheckpointError, brief
from vlm.paths import is_remote

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
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_FLOATS = {DTYPES[name] for name in ("F16", "BF16", "F32", "F64")}
_FLOATS_8 = {DTYPES["F8_E4M3"], DTYPES["F8_E5M2"]}
_SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "scale")
# Types of the format that hold no parameters as such: quantized or complex numbers.
_OTHER_DTYPES = {
    "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4",
    "U64", "U32", "U16", "C64", "C128",
}  # fmt: skip
_PART = 2**22  # elements
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_TENSORS = 50_000  # of a file
_MAX_HEADER_VALUES = 20 * _MAX_TENSORS
_MAX_AXES = 32
_MAX_NPY_HEADER = 1 << 16
_NPY_HEADER_2 = np.lib.format.read_array_header_2_0


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
    """Return how many rows of a table are read at a time: about 16 MB, at least one row."""
    return max(1, _PART // max(1, math.prod(shape[1:])))


def read_parameter(
    tensors: Tensors, name: str, start: int = 0, stop: int | None = None
) -> Shaped[np.ndarray, "..."]:
    """Read a tensor of parameters, or its rows `start:stop`.

    Raises:
        CheckpointError: its values are not floating-point numbers, or have scales beside them.
    """
    values = tensors.read(name, start, stop)
    stem = name.removesuffix("weight")
    alone = not any(stem + scale in tensors.shapes for scale in _SCALES)
    if values.dtype not in _FLOATS and not (values.dtype in _FLOATS_8 and alone):
        raise CheckpointError(
            f"{tensors.where} has {brief(name)} as {values.dtype}, as a quantized model does: get "
            "the model in float32, float16 or bfloat16"
        )
    return values


class _Entry(NamedTuple):
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """The tensors of one `.safetensors` file.

    Raises:
        CheckpointError: the file is missing, truncated or not in the format.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self.where = os.fspath(self._path)
        # Remote files are read with deadlines and retries, and looked up once.
        self._info = _look_up(self.where) if is_remote(path) else None
        self._entries = _read_header(self._path, self._info)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        offset, shape, dtype = self._entries[name]
        if shape:
            stop = shape[0] if stop is None else stop
            offset += start * math.prod(shape[1:]) * dtype.itemsize
            shape = (stop - start, *shape[1:])
        size = math.prod(shape) * dtype.itemsize
        try:
            with _open(self._path, self._info) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise CheckpointError(f"{self.where} cannot be read: {error}") from None
        if len(data) != size:
            raise CheckpointError(f"{self.where} ends inside {name}: copy or download it again")
        return np.frombuffer(data, dtype).reshape(shape)


def _look_up(path: str) -> RemoteInfo:
    try:
        return remote_info(path)
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}: the checkpoint is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _open(path: epath.Path, info: RemoteInfo | None) -> Any:
    return open_file(os.fspath(path), info) if info else path.open("rb")


def _read_header(path: epath.Path, info: RemoteInfo | None) -> dict[str, _Entry]:
    """Return the tensors in a file, after checking that they fill it."""
    try:
        with _open(path, info) as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if length > _MAX_HEADER:
                raise CheckpointError(
                    f"{path} is not a safetensors file: it may be a download's error page or "
                    "a Git LFS pointer, so download it again"
                )
            text = file.read(length)
        total = path.stat().length if info is None else info.size or 0
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}: the checkpoint is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(head) < 8 or len(text) < length:
        raise CheckpointError(f"{path} is truncated: copy or download it again")
    try:
        header = dict(parse(text.decode(), _MAX_HEADER_VALUES, _pairs))
        dict(header.pop("__metadata__", {}))
        if len(header) > _MAX_TENSORS:
            raise ValueError(f"it lists {len(header):,} tensors")
        specs = {name: dict(spec) for name, spec in header.items()}
        entries = {name: _entry(path, 8 + length, spec) for name, spec in specs.items()}
        end = _check_layout(entries, 8 + length)
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


def _entry(path: epath.Path, data: int, spec: dict[str, Any]) -> _Entry:
    """Return a tensor of the header; `data` is the offset of the first one."""
    kind = spec["dtype"]
    if not isinstance(kind, str) or kind not in _OTHER_DTYPES | DTYPES.keys():
        raise ValueError(f"a tensor of unknown type {brief(kind)}")
    if kind in _OTHER_DTYPES:
        raise CheckpointError(
            f"{path} holds tensors of type {kind}, which are quantized or not of real numbers: "
            "get the model in float32, float16 or bfloat16"
        )
    numbers = (*spec["data_offsets"], *spec["shape"])
    if any(type(n) is not int or not 0 <= n < 1 << 64 for n in numbers):
        raise ValueError("a size or an offset that is not a whole number of 64 bits")
    if len(spec["shape"]) > _MAX_AXES:
        raise ValueError(f"a tensor of {len(spec['shape']):,} axes")
    begin, end = spec["data_offsets"]
    entry = _Entry(data + begin, tuple(spec["shape"]), DTYPES[kind])
    if end - begin != entry.size:
        raise ValueError(f"shape {brief(entry.shape)} does not fill bytes {begin} to {end}")
    return entry


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, whose names must be unique."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{brief(counts.most_common(1)[0][0])} appears twice")
    return found


def _check_layout(entries: dict[str, _Entry], start: int) -> int:
    """Return the end of the last tensor; the format allows no gaps between tensors."""
    last = ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < start:
            raise ValueError(f"{brief(last)} and {brief(name)} overlap")
        if entry.offset > start:
            raise ValueError(f"there is a hole before {brief(name)}")
        start, last = entry.offset + entry.size, name
    return start


def npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and type at the start of a `.npy` file, which may come from anybody.

    Raises:
        ValueError: no such file, or a header too long, with objects, or with an impossible shape.
    """
    version = np.lib.format.read_magic(stream)
    size = stream.read(2 if version[0] == 1 else 4)
    if int.from_bytes(size, "little") > _MAX_NPY_HEADER:  # NumPy reads it before it checks
        raise ValueError("its header is too long")
    header = np.lib.format.read_array_header_1_0 if version[0] == 1 else _NPY_HEADER_2
    text = stream.read(int.from_bytes(size, "little"))
    try:
        shape, _, dtype = header(io.BytesIO(size + text))
    except Exception:  # of Python's parser, also RecursionError, MemoryError and SyntaxError
        raise ValueError("its header is corrupt") from None
    if dtype.hasobject:
        raise ValueError("it holds objects, not numbers")
    if len(shape) > _MAX_AXES or any(not 0 <= n < 1 << 63 for n in shape):
        raise ValueError(f"its shape is {brief(shape)}")
    return shape, dtype


class Shards:
    """The tensors of several files that share a checkpoint.

    Raises:
        CheckpointError: two files have the same tensor.
    """

    def __init__(self, files: Sequence[Tensors]):
        self.where = files[0].where
        self._files: dict[str, Tensors] = {}
        for file in files:
            if twice := file.shapes.keys() & self._files.keys():
                name = min(twice)
                raise CheckpointError(
                    f"{file.where} has {brief(name)}, which {self._files[name].where} has too: "
                    "download it again"
                )
            self._files |= dict.fromkeys(file.shapes, file)
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        return self._files[name].read(name, start, stop)


class Arrays:
    """Tensors that are already in memory."""

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

    An array is anything with a shape and dtype that numpy can convert, such as a jax array. One is
    converted at a time.
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
