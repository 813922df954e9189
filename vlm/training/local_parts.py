"""Parts of a training state on a local disk: the shards that one process holds.

A part is one file: a line of JSON after its checksum, then the bytes of the shards. It gets its
name once it is complete.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm.errors import CheckpointError
from vlm.sharding import path_names


class Shard(NamedTuple):
    """A shard of a state: the number of its array, and its (start, stop) in each dimension."""

    array: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.ranges)

    def overlap(self, other: "Shard") -> tuple[slice, ...] | None:
        """Return the part of this shard that another one of its array has too; None without one."""
        slices = []
        for (start, stop), (begin, end) in zip(self.ranges, other.ranges, strict=True):
            slices.append(slice(max(start, begin) - start, min(stop, end) - start))
        return None if any(s.start >= s.stop for s in slices) else tuple(slices)

    @classmethod
    def at(cls, array: int, index: Any, shape: tuple[int, ...]) -> "Shard":
        """Return the shard of an index of JAX: a slice for each dimension."""
        bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
        return cls(array, tuple((start, stop) for start, stop, _ in bounds))

    @classmethod
    def of(cls, value: Any) -> "Shard":
        """Return the shard of a JSON value."""
        return cls(value[0], tuple((start, stop) for start, stop in value[1]))


def digest(value: Any) -> str:
    """Return a digest of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def layout(state: Any) -> list[list[Any]]:
    """Return name, dtype and shape of each array of a state, as JSON values."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [["/".join(path_names(path)), str(x.dtype), list(x.shape)] for path, x in leaves]


def local_shards(state: Any) -> dict[Shard, np.ndarray]:
    """Copy the shards of this process to the host, each of them once."""
    found: dict[Shard, jax.Array] = {}
    for number, x in enumerate(jax.tree.leaves(state)):
        for shard in x.addressable_shards:
            found.setdefault(Shard.at(number, shard.index, x.shape), shard.data)
    for data in found.values():
        data.copy_to_host_async()
    # On a CPU, NumPy would share the memory that the next step reuses.
    shared = jax.default_backend() == "cpu"
    return {key: np.array(data) if shared else np.asarray(data) for key, data in found.items()}


def write_part(file: Path, about: Mapping[str, Any], shards: Mapping[Shard, np.ndarray]) -> None:
    """Write a part. `about` is JSON, and has the `layout` of the whole state."""
    parts = [array.reshape(-1).view(np.uint8) for array in shards.values()]  # no copies
    rows = [[*shard, zlib.crc32(data.data)] for shard, data in zip(shards, parts, strict=True)]
    header = json.dumps({**about, "shards": rows}).encode()
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        with unfinished.open("wb") as out:
            out.write(b"%08x %b\n" % (zlib.crc32(header), header))
            for data in parts:
                out.write(data.data)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


class Part:
    """A part on the disk, whose shards are read when they are needed.

    Attributes:
        about: what `write_part` was given.
        sizes: bytes of each shard.

    Raises:
        CheckpointError: the file is truncated or corrupt.
        OSError: it cannot be read.
    """

    def __init__(self, file: Path):
        self.file = file
        with file.open("rb") as content:
            checksum, _, header = content.readline().rstrip(b"\n").partition(b" ")
            place = content.tell()
        if checksum != b"%08x" % zlib.crc32(header):
            raise CheckpointError(f"{file} is corrupt: delete it")
        self.about: dict[str, Any] = json.loads(header)
        self.sizes: dict[Shard, int] = {}
        self._places: dict[Shard, tuple[int, int]] = {}  # offset and checksum
        for *value, crc in self.about["shards"]:
            shard = Shard.of(value)
            dtype = np.dtype(self.about["layout"][shard.array][1])
            self.sizes[shard] = math.prod(shard.shape) * dtype.itemsize
            self._places[shard] = place, crc
            place += self.sizes[shard]

    def read(self, shard: Shard) -> np.ndarray:
        """Read the bytes of a shard, and compare them with their checksum.

        Raises:
            CheckpointError: they are truncated or corrupt.
            OSError: the file cannot be read.
        """
        place, crc = self._places[shard]
        data = np.fromfile(self.file, np.uint8, self.sizes[shard], offset=place)
        if len(data) != self.sizes[shard] or zlib.crc32(data.data) != crc:
            raise CheckpointError(f"{self.file} is corrupt: delete it")
        return data
