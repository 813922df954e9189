"""WebDataset shards: examples from the members of a tar, as img2dataset writes them.

In a shard (github.com/webdataset/webdataset) files that share a name up to the first dot are one
example: `000017.jpg`, `000017.txt`, `000017.json`. `members` defines their feature names. A
`.parquet` beside a shard, as img2dataset writes one, adds its columns by `key`.
"""

from typing import Any

from vlm.config import DataConfig
from vlm.data import tar
from vlm.data.examples import WHERE, Example
from vlm.data.faults import BadSample
from vlm.data.members import image_of, is_image, reads, texts_of
from vlm.data.shards import Record, Records
from vlm.data.sidecar import read_sidecar
from vlm.data.storage import SequentialFile, read_range


class TarFormat:
    """Stream format of tar shards; an offset is the first byte of an example.

    With an index of the shards, a part is a range of consecutive examples.
    """

    kind = "tar"

    def __init__(self, config: DataConfig, *, sidecar: bool = False, index: Any = None):
        self._config, self.sidecar, self._index = config, sidecar, index
        # "no image" is counted when such an example is read.
        faults = index.faults if index is not None else ()
        self.faults = [fault for fault in faults if fault["kind"] != "no image"]
        self._reads = reads(config)
        self.images = True  # else their bytes are skipped

    def read(
        self, shard: str, offset: int, number: int, chunk: int, part: int = 0, parts: int = 1
    ) -> Records:
        """Yield the examples of a part of a shard, from `offset` on."""
        wanted = self._reads
        if not self.images:
            wanted = lambda name: self._reads(name) and not is_image(name)  # noqa: E731
        rows = read_sidecar(shard, self._config) if self.sidecar else {}
        if parts == 1:
            file = SequentialFile(shard, offset, chunk)
        else:
            first, end = self._index.range_of(shard, part, parts)
            offset = max(first, offset)
            file = SequentialFile.of(read_range(shard, offset, end) if offset < end else b"")
            file.offset = offset
        try:
            for group in tar.groups(file, wanted, whole=parts == 1):
                try:
                    example = example_of(group, self._config, shard, rows.get(stem_of(group.key)))
                except BadSample as bad:
                    example = bad
                yield Record(example, group.end)
        finally:
            file.close()


def example_of(
    group: tar.Group, config: DataConfig, shard: str, more: dict[str, Any] | None = None
) -> Example:
    """Make an example from members of a tar file and `more` features of a table beside it."""
    where, parts = f"{shard}: {group.key}", group.parts
    if group.repeated is not None:
        why = f"{where} has two members with the extension {group.repeated}: give each its own"
        raise BadSample("repeated member", where, why)
    image = image_of(parts, config, where)
    beside = {extension: data for extension, data in parts.items() if extension != image}
    start, dot, _ = image.rpartition(".")
    if dot:
        inner = {e: d for e, d in beside.items() if e.startswith(f"{start}.")}
        beside = {e.removeprefix(f"{start}."): d for e, d in inner.items()} | beside
    texts = texts_of(beside, config, where)
    return {**(more or {}), **texts, config.image: parts[image], WHERE: where}


def stem_of(key: str) -> str:
    """Return the key of an example in a table beside the shard: its name without folder."""
    return key.rpartition("/")[2]
