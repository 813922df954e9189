"""Writer of one shard of prepared examples, one example at a time."""

import collections
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from typing import Any

from etils import epath

from vlm._json import to_json
from vlm.data import array_record
from vlm.data.faults import BadSample
from vlm.data.members import TEXT
from vlm.data.near_duplicates import Signatures
from vlm.data.prepare_example import Preparation, PreparedExample

NOTE = "preparation.json"
_BUFFER = 1 << 20  # bytes


class ShardWriter:
    """Writes a shard under a temporary name, which `finish` replaces by its own.

    Args:
        folder: of all shards.
        split: its name is in that of the shard.
        wanted: settings of the preparation.
        number: of the shard.
        unfinished: appended to the temporary name.
    """

    def __init__(
        self,
        folder: epath.Path,
        split: str,
        wanted: Preparation,
        number: int,
        unfinished: str = ".part",
    ):
        self._folder, self.number = folder, number
        self._name = {
            "tar": f"{split}-{number:05d}.tar",
            "array_record": f"{split}-{number:05d}.array_record",
            "clip_benchmark": f"{split}/{number}.tar",
        }[wanted.form]
        self._part = folder / f"{self._name}{unfinished}"
        self._form = wanted.form
        self._file: _TarFile | _RecordFile | None = None  # opened for the first example
        self._left_out: collections.Counter[str] = collections.Counter()
        self._dropped: collections.Counter[str] = collections.Counter()
        self._read, self._next = 0, [0]
        self.signatures: list[Signatures] = []  # of the written examples

    @property
    def examples(self) -> int:
        """Number of written examples."""
        return len(self.signatures)

    def add(self, result: PreparedExample | BadSample, read: int, place: list[int]) -> None:
        """Write an example, or count a skipped one.

        Args:
            result: the example.
            read: number of examples read so far.
            place: where the next one is read.
        """
        self._read, self._next = read, place
        if isinstance(result, BadSample):
            self._left_out[result.kind] += result.samples
            return
        if self._file is None:
            self._part.parent.mkdir(exist_ok=True)
            if self._form == "array_record":
                self._file = _RecordFile(self._part)
            else:
                members = _members if self._form == "tar" else _clip_benchmark_members(self._folder)
                self._file = _TarFile(self._part, self.number, members)
        self._file.add(result)
        self._dropped.update(result.dropped)
        self.signatures.append(result.signatures)

    def finish(self) -> dict[str, Any]:
        """Complete the shard; return its line of the manifest."""
        line: dict[str, Any] = {"shard": self.number, "file": None}
        if self._file is not None:
            line["file"] = self._name
            self._file.close()
            line |= {"bytes": self._part.stat().length, "sha256": self._file.digest()}
            os.replace(self._part, self._folder / self._name)
            line["dropped"] = self._dropped
        return line | {
            "examples": self.examples,
            "left_out": dict(self._left_out),
            "read": self._read,
            "next": self._next,
        }

    def close(self) -> None:
        """Close the file; without `finish` the shard stays unfinished."""
        if self._file is not None:
            self._file.close()


class _HashingFile(io.FileIO):
    """File for writing that computes the SHA-256 of its content."""

    def __init__(self, path: epath.Path):
        super().__init__(os.fspath(path), "w")
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        count = super().write(data)
        self.sha256.update(memoryview(data)[:count])
        return count


class _TarFile:
    def __init__(
        self,
        path: epath.Path,
        number: int,
        members: Callable[[PreparedExample], dict[str, bytes]],
    ):
        self._hashing = _HashingFile(path)
        self._file = io.BufferedWriter(self._hashing, _BUFFER)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._number, self._members, self._count = number, members, 0

    def add(self, item: PreparedExample) -> None:
        for suffix, data in self._members(item).items():
            info = tarfile.TarInfo(f"{self._number:05d}{self._count:06d}.{suffix}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._count += 1

    def close(self) -> None:
        if not self._file.closed:
            self._tar.close()
            self._file.close()

    def digest(self) -> str:
        return self._hashing.sha256.hexdigest()


class _RecordFile:
    def __init__(self, path: epath.Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path, self._writer = path, ArrayRecordWriter(os.fspath(path), "group_size:1")

    def add(self, item: PreparedExample) -> None:
        self._writer.write(
            array_record.serialize({"caption": item.captions, **item.features, "image": item.image})
        )

    def close(self) -> None:
        if self._writer.is_open():
            self._writer.close()

    def digest(self) -> str:
        with open(self._path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


def _members(item: PreparedExample) -> dict[str, bytes]:
    """Return the members of an example by suffix; the feature `txt` is the member `.txt`."""
    fields = {name: value for name, value in item.features.items() if name != TEXT}
    text = to_json(fields, ensure_ascii=False).encode()
    return {item.suffix: item.image, TEXT: item.text.encode(), "json": text}


def _clip_benchmark_members(folder: epath.Path) -> Callable[[PreparedExample], dict[str, bytes]]:
    """Return `_members` of CLIP_benchmark's layout: the number of the class, or all captions."""
    labels = json.loads((folder / NOTE).read_text()).get("labels", ())
    numbers = {label: i for i, label in enumerate(labels)}

    def members(item: PreparedExample) -> dict[str, bytes]:
        if item.label is not None:
            return {item.suffix: item.image, "cls": str(numbers[item.label]).encode()}
        lines = (" ".join(caption.split()) for caption in item.captions)
        return {item.suffix: item.image, TEXT: "\n".join(lines).encode()}

    return members
