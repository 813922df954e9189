"""Safe reader of PyTorch's files (`.pt`, `.bin`), without PyTorch.

The files are zip archives of a pickle and raw storages. Python's unpickler builds and calls
anything that a pickle names. This one reads only the opcodes that tensors are written with, and
returns strings, numbers, lists, dicts and records. Nothing that it builds can be called, and the
offset, shape and strides of a tensor are checked against its storage.

https://docs.python.org/3/library/pickletools.html
"""

import math
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.errors import CheckpointError, brief

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_DICT = ("collections", "OrderedDict")
_REBUILD = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")}
# Functions that return their first argument: parameters, and tuples, lists and typed values of
# TorchScript.
_FIRST = {
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch.jit._pickle", "build_intlist"),
    ("torch.jit._pickle", "build_boollist"),
    ("torch.jit._pickle", "build_doublelist"),
    ("torch.jit._pickle", "build_tensorlist"),
    ("torch.jit._pickle", "restore_type_tag"),
}
_KNOWN = {_DICT, *_REBUILD, *_FIRST, *(("torch", name) for name in _STORAGES)}
_MAX_PICKLE = 4_000_000  # bytes; a pickle of 10,000 tensors has one million
_MAX_DEPTH = 100  # of modules inside modules
_MAX_AXES = 32
_MAX_NAME = 500  # characters
_MAX_VALUES = 200_000  # in all modules together, shared ones counted each time


@dataclass(frozen=True)
class _Name:
    """A global name in the pickle; the object itself is never imported."""

    module: str
    name: str

    @property
    def is_script(self) -> bool:
        return self.module == "__torch__" or self.module.startswith("__torch__.")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int  # elements, as stated in the pickle


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements

    @property
    def span(self) -> int:
        """Number of elements from its first to its last, inclusive."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


@dataclass
class _Module:
    """A module of a TorchScript archive: its state."""

    state: dict = field(default_factory=dict)


class _RefusedError(Exception):
    """An operation that no pickle of tensors needs."""


def _unpickle(data: bytes) -> Any:
    """Return the content of a pickle as plain values and the records above.

    Raises:
        _RefusedError: it has an operation that no file of tensors needs.
        ValueError, IndexError, KeyError: it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}  # by number

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for opcode, value, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT"
                | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
            ):  # fmt: skip
                stack.append(value)
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise IndexError("the stack is empty")
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if opcode.name == "APPEND" else since_mark()
                _of(list, stack[-1]).extend(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(-2), stack.pop()] if opcode.name == "SETITEM" else since_mark()
                _set_items(_of(dict, stack[-1]), values)
            case "GLOBAL":
                stack.append(_named(*str(value).split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_named(_of(str, module), _of(str, name)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(_of(_Name, function), _of(tuple, arguments)))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                if arguments != () or not _of(_Name, kind).is_script:
                    raise _RefusedError(f"it makes an object of {kind.module}.{kind.name}")
                stack.append(_Module())
            case "BUILD":
                _build(stack.pop(-2), stack[-1], stack)
            case name:
                raise _RefusedError(f"it has the opcode {name}")
    raise ValueError("it does not end")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise _RefusedError(f"it takes a {type(value).__name__} for a {kind.__name__}")
    return value


def _named(module: str, name: str) -> _Name:
    found = _Name(module, name)
    if (module, name) not in _KNOWN and not found.is_script:
        raise _RefusedError(f"it wants to import {brief(f'{module}.{name}')[1:-1]}")
    return found


def _set_items(target: dict, values: list[Any]) -> None:
    if len(values) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, int):
            raise _RefusedError(f"it has a key that is a {type(key).__name__}")
        target[key] = value


def _build(target: Any, state: Any, stack: list[Any]) -> None:
    """Set the state of `target`, which replaces `state` on the stack."""
    if type(target) is _Module and not target.state and type(state) is dict:
        target.state = state
    elif type(target) is not dict:  # attributes of an OrderedDict are ignored
        raise _RefusedError(f"it changes a {type(target).__name__}")
    stack[-1] = target


def _storage(record: Any) -> _Storage:
    if type(record) is not tuple or len(record) != 5 or record[0] != "storage":
        raise _RefusedError("it has a record that is not of a storage")
    _, kind, key, _, count = record
    if type(kind) is not _Name or kind.module != "torch" or kind.name not in _STORAGES:
        raise _RefusedError("it has a storage without a type of numbers")
    if type(key) is not str or not re.fullmatch(r"\w{1,100}", key) or type(count) is not int:
        raise _RefusedError(f"it has a storage by the name {brief(key)}")
    return _Storage(key, _STORAGES[kind.name], count)


def _call(function: _Name, arguments: tuple) -> Any:
    name = (function.module, function.name)
    if name == _DICT and not arguments:
        return {}
    if name in _FIRST and arguments:
        return arguments[0]
    if name in _REBUILD and len(arguments) >= 4:
        return _tensor(*arguments[:4])
    raise _RefusedError(f"it wants to call {function.module}.{function.name}")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    """Return a tensor, after checking that it is inside its storage and does not overlap itself."""
    numbers = (offset, *_of(tuple, size), *_of(tuple, stride))
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise _RefusedError(
            f"it has a tensor of shape {brief(size)}, strides {brief(stride)} and offset "
            f"{brief(offset)}"
        )
    tensor = _Tensor(_of(_Storage, storage), offset, size, stride)
    if len(size) > _MAX_AXES:
        raise _RefusedError(f"it has a tensor of {len(size)} axes")
    if math.prod(size) > tensor.span:
        raise _RefusedError(f"it has a tensor of shape {brief(size)} that overlaps itself")
    if offset + tensor.span > storage.count:
        raise _RefusedError(
            f"it has a tensor of shape {brief(size)} that ends outside its storage of "
            f"{brief(storage.count)} numbers"
        )
    return tensor


class TorchFile:
    """The tensors of one file of `torch.save` or `torch.jit.save`, read on request.

    Raises:
        CheckpointError: missing, truncated, in PyTorch's format before 1.6, or its pickle does more
            than describe tensors.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self.where = os.fspath(path)
        try:
            with self._path.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                names = [member.filename for member in members]
                pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
                if len(set(pickles)) != 1:
                    raise CheckpointError(f"{path} is a zip archive, but not one of PyTorch's")
                root = pickles[0].removesuffix("data.pkl")
                self._members = self._find(members, root)
                pickle = archive.getinfo(pickles[0])
                if pickle.file_size > _MAX_PICKLE:
                    raise _RefusedError(f"its pickle has {pickle.file_size:,} bytes")
                content = _unpickle(archive.read(pickle))
            self._tensors = self._named_tensors(content, self._path.stat().length)
        except zipfile.BadZipFile as error:
            reason = "is no zip archive" if "not a zip" in str(error) else f"is damaged ({error})"
            raise CheckpointError(
                f"{path} {reason}: it is truncated, or from a PyTorch before 1.6; load it and save "
                "it again with torch, or get it as safetensors"
            ) from None
        except FileNotFoundError:
            raise CheckpointError(f"there is no {path}: the checkpoint is incomplete") from None
        except CheckpointError:
            raise
        except _RefusedError as error:
            raise CheckpointError(
                f"{path} is refused, for {error}: a checkpoint holds only tensors; get it as "
                "safetensors"
            ) from None
        except Exception as error:  # a damaged pickle or archive fails in many ways
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}): download it again"
            ) from None
        self.is_script = isinstance(content, _Module)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        tensor = self._tensors[name]
        shape, strides, dtype = tensor.shape, tensor.strides, tensor.storage.dtype
        offset = tensor.offset
        if shape:
            first, last, _ = slice(start, stop).indices(shape[0])
            offset, shape = offset + first * strides[0], (max(last - first, 0), *shape[1:])
        if 0 in shape:
            return np.zeros(shape, dtype)
        span = _Tensor(tensor.storage, offset, shape, strides).span
        data = self._read(tensor.storage, offset * dtype.itemsize, span * dtype.itemsize, name)
        flat = np.frombuffer(data, dtype)
        steps = [s * dtype.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    def _read(self, storage: _Storage, offset: int, size: int, name: str) -> bytes:
        """Return a range of bytes of a storage; a complete one is compared with its checksum."""
        member = self._members[storage.key]
        try:
            with self._path.open("rb") as file:
                file.seek(member.header_offset)
                # The local header: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
                header = struct.unpack("<4s22xHH", file.read(30))
                if header[0] != b"PK\x03\x04":
                    raise CheckpointError(f"{self.where} does not have {name} at its listed offset")
                file.seek(sum(header[1:]) + offset, os.SEEK_CUR)
                data = file.read(size)
        except (OSError, struct.error) as error:
            raise CheckpointError(f"{self.where} has no whole {name} ({error})") from None
        if len(data) != size:
            raise CheckpointError(f"{self.where} ends inside {name}: download it again")
        if size == member.file_size and zlib.crc32(data) != member.CRC:
            raise CheckpointError(f"{self.where} is damaged in {name}: download it again")
        return data

    def _find(self, members: list[zipfile.ZipInfo], root: str) -> dict[str, zipfile.ZipInfo]:
        """Return the members of the archive that are storages, by their keys."""
        found: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            name = member.filename
            if name != f"{root}data.pkl" and not name.startswith(f"{root}data/"):
                continue
            key = name.removeprefix(f"{root}data/")
            if key in found:
                raise _RefusedError(f"it has two members {brief(name)}")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise _RefusedError(f"its member {brief(name)} is compressed")
            found[key] = member
        return found

    def _named_tensors(self, content: Any, file_size: int) -> dict[str, _Tensor]:
        """Return the tensors by their dotted names, after checking that all are in the file."""
        tensors: dict[str, _Tensor] = {}
        total = 0
        for name, tensor in _flat(_state(content)):
            if name in tensors:
                raise _RefusedError(f"it has two tensors {brief(name)}")
            tensors[name] = tensor
            storage, size = tensor.storage, tensor.storage.dtype.itemsize
            member = self._members.get(storage.key)
            if member is None or member.file_size < storage.count * size:
                raise CheckpointError(
                    f"{self.where} has no whole storage {storage.key} of {brief(name)}: "
                    "download it again"
                )
            total += math.prod(tensor.shape) * size
            # Two names may share a storage, as tied weights do; a thousand are an attack.
            if total > 2 * file_size:
                raise _RefusedError("its tensors together are larger than twice the file")
        return tensors


def _state(content: Any) -> Any:
    """Return the mapping of tensors in a training checkpoint, from `state_dict` or `model`."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and of torch.compile
        if isinstance(content, dict) and all(str(name).startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _flat(content: Any) -> Iterator[tuple[str, _Tensor]]:
    """Yield each tensor of nested dicts and modules by its dotted name."""
    stack: list[tuple[str, Any, int]] = [("", content, 0)]
    for _ in range(_MAX_VALUES):
        if not stack:
            return
        prefix, node, depth = stack.pop()
        if isinstance(node, _Tensor):
            yield prefix, node
        elif isinstance(node, _Module | dict):
            if depth > _MAX_DEPTH:
                raise _RefusedError("it contains itself, or is nested too deep")
            items = (node.state if isinstance(node, _Module) else node).items()
            for name, value in reversed(items):
                full = f"{prefix}.{name}" if prefix else str(name)
                if len(full) > _MAX_NAME:
                    raise _RefusedError(f"it has the name {brief(full)}")
                stack.append((full, value, depth + 1))
    raise _RefusedError(f"it has more than {_MAX_VALUES:,} values")
