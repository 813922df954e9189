"""PyTorch's files (`.pt`, `.bin`) without PyTorch and without trusting them.

They are zip archives of a pickle and of raw storages. A pickle can import and call anything, so
this unpickler knows the names that tensors are made of and refuses every other; what those names
stand for here are records, which read their numbers from the archive when they are asked for.
"""

import collections
import os
import pickle
import zipfile
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from vlm.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


class _Module:
    """Stands for any module of a TorchScript archive: a bag of what its state holds."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def _rebuild_tensor(storage, offset, size, stride, *rest) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _rebuild_parameter(tensor, *rest):
    return tensor


def _first(value, *rest):
    return value


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    # TorchScript's lists, and its note of their type.
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"an unknown record {pid!r}")
        if not isinstance(pid[1], np.dtype):
            raise pickle.UnpicklingError("a storage without a type")
        return _Storage(str(pid[2]), pid[1])


class TorchFile:
    """The tensors of one file of `torch.save` or `torch.jit.save`, read when asked for.

    Raises:
        CheckpointError: missing, torn, of PyTorch's format before 1.6, or a pickle that would
            import something other than tensors.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self.where = os.fspath(path)
        try:
            with self._path.open("rb") as file, zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise CheckpointError(f"{path} is a zip archive, but not one of PyTorch's")
                self._root = pickles[0].removesuffix("data.pkl")
                with archive.open(pickles[0]) as stream:
                    content = _Unpickler(stream).load()
        except zipfile.BadZipFile:
            raise CheckpointError(
                f"{path} is no zip archive: it is torn, or from a PyTorch before 1.6; load it and "
                "save it again with torch, or get it as safetensors"
            ) from None
        except FileNotFoundError:
            raise CheckpointError(f"there is no {path}: the checkpoint is incomplete") from None
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is refused, for {error}: a checkpoint holds tensors alone; get it as "
                "safetensors"
            ) from None
        except Exception as error:  # a damaged pickle fails in any way
            raise CheckpointError(f"{path} is damaged ({error}): download it again") from None
        self.is_script = isinstance(content, _Module)
        self._tensors = dict(_flat("", _state(content)))
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        tensor = self._tensors[name]
        shape, strides, dtype = tensor.shape, tensor.strides, tensor.storage.dtype
        offset = tensor.offset
        if shape:
            first, last, _ = slice(start, stop).indices(shape[0])
            offset, shape = offset + first * strides[0], (last - first, *shape[1:])
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 in shape:
            return np.zeros(shape, dtype)
        member = f"{self._root}data/{tensor.storage.key}"
        try:
            with (
                self._path.open("rb") as file,
                zipfile.ZipFile(file) as archive,
                archive.open(member) as stream,
            ):
                stream.seek(offset * dtype.itemsize)
                data = stream.read(span * dtype.itemsize)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.where} has no whole {name} ({error})") from None
        if len(data) != span * dtype.itemsize:
            raise CheckpointError(f"{self.where} ends inside {name}: download it again")
        flat = np.frombuffer(data, dtype)
        steps = [s * dtype.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)


def _state(content: Any) -> Any:
    """The mapping of tensors inside the usual wrappings of a training checkpoint."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict) and all(str(name).startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _flat(prefix: str, node: Any):
    """Every tensor of nested dicts and modules by its dotted name."""
    if isinstance(node, _Tensor):
        yield prefix, node
    elif isinstance(node, _Module | dict):
        for name, value in (
            node if isinstance(node, dict) else vars(node).get("state", {})
        ).items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), value)
