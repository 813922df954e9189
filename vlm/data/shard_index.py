"""Random access to WebDataset shards, by a memory-mapped index of the examples' offsets.

The index takes eight bytes per example; all processes and workers of a machine share its pages.
`vlm data index` writes it beside the shards; else it is written to the cache folder when the shards
are opened. File format: length of the header (8 bytes), the header (JSON, padded), and for each
shard the offsets of its examples and of its end (uint64, little-endian).
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import UInt64

from vlm.config import DataConfig
from vlm.data import tar
from vlm.data.examples import Example, check_features, known_features, wanted_features
from vlm.data.faults import BadSample
from vlm.data.members import is_image, reads
from vlm.data.shards import known_count, shard_fault
from vlm.data.sidecar import Sidecars, sidecar_path
from vlm.data.splits import split_files
from vlm.data.storage import (
    CHUNK,
    READERS,
    SequentialFile,
    cache_path,
    exists,
    hashed_path,
    read_file,
    read_range,
    size_of,
    write_whole,
)
from vlm.data.webdataset import example_of, stem_of
from vlm.errors import DataError, warn_once
from vlm.paths import is_remote

SUFFIX = ".vlm-index"
VERSION = 2

# Returns the offsets of the examples of a shard (and of the end), its size, and its faults.
ScanShard = Callable[[str], tuple[UInt64[np.ndarray, " n"], int, list[BadSample]]]

_LENGTH = struct.Struct("<Q")
_SCANNED = 8 << 10  # bytes of a read between images
_CHECKED = 8  # shards whose size is compared with the index


class Offsets:
    """Memory-mapped offsets of the examples in shards; mapped again after pickling."""

    def __init__(self, path: str):
        self._path = path
        self._open()
        self.faults: list[dict[str, Any]] = self._header["faults"]

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_offsets", "_first", "_header")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def _open(self) -> None:
        self._header, self._offsets = read_index(self._path)
        counts = [shard[2] for shard in self._header["shards"]]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class ShardSource(Offsets):
    """Source over the examples of tar shards; reads one example per request."""

    def __init__(self, path: str, names: Sequence[str], config: DataConfig):
        super().__init__(path)
        self._config, self._reads = config, reads(config)
        self._names = self.files = list(names)
        self._sidecars: Sidecars | None = None
        if not len(self):
            last = BadSample(**self.faults[-1]) if self.faults else None
            raise DataError(
                f"the shards {config.source} have no examples: name files such as 000017.jpg in "
                "them"
                if last is None
                else f"{last}: fetch it again, or check data.source"
            ) from last

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        name = self._names[shard]
        start, end = self._offsets[index + shard : index + shard + 2].tolist()
        try:
            file = SequentialFile.of(read_range(name, start, end))
            group = next(tar.groups(file, self._reads, whole=False))
            more = self._sidecars.row(shard, stem_of(group.key)) if self._sidecars else None
        except (OSError, tar.CorruptFileError, StopIteration) as error:
            why = f"example {index} of {name} cannot be read at its offset in the index ({error})"
            raise BadSample.failed_read(name, why, error) from None
        return self._example(group, name, more)

    def _example(self, group: tar.Group, shard: str, more: dict[str, Any] | None) -> Example:
        """Make the example of a group of members."""
        return example_of(group, self._config, shard, more)

    def scan(self) -> Iterator[Example | BadSample]:
        """Yield all examples without their images, whose bytes are skipped."""
        for shard, name in enumerate(self._names):
            left = int(self._first[shard + 1] - self._first[shard])
            file = SequentialFile(name, 0, CHUNK if is_remote(name) else _SCANNED)
            try:
                groups = tar.groups(file, lambda part: self._reads(part) and not is_image(part))
                while left:
                    group = next(groups)
                    if not any(map(is_image, group.parts)):
                        continue  # not in the index
                    left -= 1
                    try:
                        more = None
                        if self._sidecars:
                            more = self._sidecars.row(shard, stem_of(group.key))
                        yield self._example(group, name, more)
                    except BadSample as bad:
                        yield bad
            except (OSError, tar.CorruptFileError, StopIteration) as error:
                why = f"the shard {name} cannot be read as its index says ({error})"
                yield from [BadSample.failed_read(name, why, error)] * left
            finally:
                file.close()

    def use_sidecars(self) -> None:
        """Add the columns of sidecar tables to the examples."""
        self._sidecars = Sidecars(self._names, self._config)

    def shard_name(self, index: int) -> str:
        """Return the name of the shard with an example."""
        return self._names[int(np.searchsorted(self._first, index, "right")) - 1]


class ShardParts(Offsets):
    """Byte ranges of the parts of shards in a stream, by their index."""

    def __init__(self, names: Sequence[str]):
        super().__init__(index_for(list(names)))
        self._numbers = {name: number for number, name in enumerate(names)}

    def range_of(self, shard: str, part: int, parts: int) -> tuple[int, int]:
        """Return the first byte and the end of part `part` of `parts` equal ones of a shard."""
        number = self._numbers[shard]
        offsets = self._offsets[self._first[number] + number : self._first[number + 1] + number + 1]
        count = len(offsets) - 1
        first, end = (-(-count * p // parts) for p in (part, part + 1))
        # Examples without an image before the first one belong to it.
        return int(offsets[first]) if first else 0, int(offsets[end])


def open_split(config: DataConfig, split: str) -> ShardSource:
    """Open the shards of `config.source`, with `{split}` replaced by `split`.

    Of a broken shard the readable examples are used. Losses are logged and listed in the source's
    `faults`. DataError if there are no examples, or they lack wanted features.
    """
    names = split_files(config.source, split, config.train_split)
    source = ShardSource(index_for(names), names, config)
    for fault in source.faults:
        warn_once(f"{fault['why']}: {fault.get('samples', 1):,} samples are lost")
    where = f"the shards {config.source}"
    known = known_features(source, config, where)
    missing = [name for name in wanted_features(config) if name not in known]
    if missing and exists(sidecar_path(source.shard_name(0))):
        source.use_sidecars()
        known = known_features(source, config, where)
    check_features(config, known, where)
    return source


def beside(names: Sequence[str]) -> str:
    """Return the path of the index beside these shards."""
    folder = names[0].rpartition("/")[0]
    short = "\n".join(name.rpartition("/")[2] for name in names)
    stem = hashlib.sha256(short.encode()).hexdigest()[:12]
    return f"{folder}/{stem}{SUFFIX}" if folder else f"{stem}{SUFFIX}"


def write_index(
    names: Sequence[str], path: str, scan_shard: ScanShard | None = None, *, progress=iter
) -> dict[str, Any]:
    """Read the headers of all shards and write their index to `path`; return its header."""
    shards, tables = [], []
    faults: list[BadSample] = []
    with ThreadPoolExecutor(READERS) as pool:
        for name, (offsets, size, found) in zip(
            names, progress(pool.map(scan_shard or _offsets_of, names)), strict=True
        ):
            shards.append([name.rpartition("/")[2], size, max(0, len(offsets) - 1)])
            tables.append(offsets)
            faults += found
    _count_lost(faults, names, [shard[2] for shard in shards])
    records = [fault.record() for fault in faults]
    header = {"version": VERSION, "shards": shards, "faults": records}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % 64)
    flat = np.concatenate(tables).astype("<u8") if tables else np.zeros(0, "<u8")
    write_whole(path, _LENGTH.pack(len(text)), text, flat.tobytes())
    return header


def read_index(path: str) -> tuple[dict[str, Any], UInt64[np.ndarray, " n"]]:
    """Read the header of an index and memory-map its offsets; DataError if it is corrupt."""
    try:
        with open(path, "rb") as f:
            (length,) = _LENGTH.unpack(f.read(_LENGTH.size))
            header = json.loads(f.read(length))
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']}")
        count = sum(shard[2] for shard in header["shards"]) + len(header["shards"])
        if not count:
            return header, np.zeros(0, np.uint64)
        return header, np.memmap(path, "<u8", "r", _LENGTH.size + length, (count,))
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError) as error:
        raise DataError(
            f"the index {path} cannot be read ({error}): rebuild it with vlm data index"
        ) from None


def index_for(names: list[str], scan_shard: ScanShard | None = None) -> str:
    """Return the index file of these shards: the one beside them, or one in the cache.

    `scan_shard` finds the examples in a shard that is not a tar file.
    """
    prepared = beside(names)
    if exists(prepared):
        path = prepared
        if is_remote(prepared):
            data = read_file(prepared)
            path = hashed_path(data, SUFFIX)
            if not os.path.exists(path):
                write_whole(path, data)
        _check_sizes(read_index(path)[0], names, prepared)
        return path
    path = cache_path(names, SUFFIX)
    if os.path.exists(path):
        try:
            read_index(path)
            return path
        except DataError:
            pass  # corrupt: rewrite it
    write_index(names, path, scan_shard)
    return path


def _check_sizes(header: dict[str, Any], names: list[str], path: str) -> None:
    shards = header["shards"]
    if [shard[0] for shard in shards] != [name.rpartition("/")[2] for name in names]:
        raise DataError(f"the index {path} belongs to other shards: rebuild it with vlm data index")
    for i in np.linspace(0, len(names) - 1, min(_CHECKED, len(names))).astype(int).tolist():
        try:
            size = size_of(names[i])
        except FileNotFoundError:
            size = 0
        except OSError as error:
            raise DataError(
                f"the shard {names[i]} cannot be read ({error}): check data.source"
            ) from None
        if size != shards[i][1]:
            raise DataError(
                f"the shard {names[i]} has {size:,} bytes, and {shards[i][1]:,} in its "
                f"index {path}: rebuild it with vlm data index"
            )


def _offsets_of(name: str) -> tuple[UInt64[np.ndarray, " n"], int, list[BadSample]]:
    """Return the offsets of examples with an image (and of the end), shard size, and faults."""
    offsets: list[int] = []
    faults: list[BadSample] = []
    size, end, without = 0, 0, []
    file = SequentialFile(name)
    try:
        size = size_of(name)
        for group in tar.groups(file, lambda extension: False):
            if any(map(is_image, group.parts)):
                offsets.append(end)
            else:
                without.append(f"{group.key} ({', '.join(group.parts)})")
            end = group.end
    except (OSError, tar.CorruptFileError) as error:
        faults.append(shard_fault(error, name))
    finally:
        file.close()
    if without:
        which = f"{', '.join(without[:3])}{', ...' * (len(without) > 3)}"
        why = f"the shard {name} has examples without an image: {which}"
        faults.append(BadSample("no image", name, why, len(without)))
    return np.array([*offsets, end], np.uint64), size, faults


def _count_lost(faults: list[BadSample], names: Sequence[str], counts: list[int]) -> None:
    """Set the samples lost in broken shards: relative to their known size, else to the mean."""
    broken = {fault.where: fault for fault in faults if fault.kind != "no image"}
    complete = [count for name, count in zip(names, counts, strict=True) if name not in broken]
    mean = round(sum(complete) / max(1, len(complete)))
    for name, count in zip(names, counts, strict=True):
        if name in broken:
            broken[name].samples = max(1, (known_count(name) or mean) - count)
