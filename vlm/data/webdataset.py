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
from vlm.data.members import image_of, reads, texts_of
from vlm.data.shards import Record, Records
from vlm.data.sidecar import read_sidecar
from vlm.data.storage import SequentialFile


class TarFormat:
    """Stream format of tar shards; an offset is the first byte of an example."""

    kind = "tar"

    def __init__(self, config: DataConfig, *, sidecar: bool = False):
        self._config, self._sidecar = config, sidecar
        self._reads = reads(config)

    def read(self, shard: str, offset: int, number: int, chunk: int) -> Records:
        """Yield the examples of a shard from `offset` on."""
        rows = read_sidecar(shard, self._config) if self._sidecar else {}
        file = SequentialFile(shard, offset, chunk)
        try:
            for group in tar.groups(file, self._reads):
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
