"""WebDataset shards with random access: an index of every member of the tar files.

In a shard (github.com/webdataset/webdataset) files that share a name up to the first dot are one
example: `000017.jpg`, `000017.txt`, `000017.json`. Here extensions become features: an image is
`config.image`, `.txt` is the first of `config.captions`, and the fields of `.json` keep their
names. Only tar headers are read to make the index, which is kept in the cache folder.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from vlm.config import DataConfig
from vlm.errors import DataError
from vlm.paths import as_path, cache_dir, is_remote

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2")
_KINDS = ("image", "txt", "json")


class ShardSource:
    """Examples of tar shards; reads the bytes of one example and nothing else."""

    def __init__(self, shards: list[str], index: np.ndarray, config: DataConfig):
        self._shards, self._index, self._config = shards, index, config

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, *spans = self._index[index].tolist()
        path, config = self._shards[shard], self._config
        parts = {}
        with as_path(path).open("rb") as f:
            for kind, start, size in zip(_KINDS, spans[::2], spans[1::2], strict=True):
                if start:
                    f.seek(start)
                    parts[kind] = f.read(size)
        example: dict[str, Any] = {}
        where = f"example {index} in {path}"
        try:
            if "json" in parts:
                example |= json.loads(parts["json"])
            if "txt" in parts and config.captions:
                example[config.captions[0]] = parts["txt"].decode().strip()
        except (ValueError, TypeError) as error:
            raise DataError(f"the text of {where} cannot be read: {error}") from None
        example[config.image] = parts["image"]
        for feature in (config.label,) if config.label else config.captions:
            if feature not in example:
                raise DataError(f"{where} has no {feature!r}: it has {', '.join(sorted(example))}")
        return example


def open_shards(config: DataConfig, split: str) -> ShardSource:
    """The examples of the shards that `config.source` names, `{split}` in it replaced by `split`.

    The source may hold `*` and ranges such as `{00000..00099}`, on local disk or in a bucket.

    Raises:
        DataError: no shard, a shard that is torn, or no example in them.
    """
    pattern = config.source
    if "{split}" not in pattern and split != config.train_split:
        raise DataError(
            f"data.source {pattern!r} has no {{split}} in it, so there is no split {split!r}: name "
            "the shards by split, or set eval_split=None"
        )
    shards = expand_shards(pattern.replace("{split}", split))
    with ThreadPoolExecutor(16) as pool:  # headers wait for the disk or the bucket
        tables = list(pool.map(_index_of, shards))
    index = np.concatenate(
        [np.insert(table, 0, number, axis=1) for number, table in enumerate(tables)]
    )
    if not len(index):
        raise DataError(f"the shards {pattern} hold no image: is each named like 000017.jpg?")
    return ShardSource(shards, index, config)


def expand_shards(pattern: str) -> list[str]:
    """The shards that a pattern names, in order.

    Raises:
        DataError: none of them exists, or one of a range is missing.
    """
    names = [pattern]
    while found := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
        first, last = found.groups()
        numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        names = [name.replace(found.group(), n, 1) for name in names for n in numbers]
    shards = []
    for name in names:
        if "*" not in name:
            shards.append(name)
        elif is_remote(name):
            folder, _, last = name.rpartition("/")
            shards += sorted(os.fspath(p) for p in epath.Path(folder).glob(last))
        else:
            shards += sorted(glob.glob(os.path.expanduser(name)))
    if not shards:
        raise DataError(f"there are no shards {pattern}: check data.source")
    return shards


def _index_of(shard: str) -> np.ndarray:
    """(examples, 6) int64: offset and size of the image, text and JSON; 0 for what is not there."""
    path = as_path(shard)
    try:
        stat = path.stat()
    except OSError:
        raise DataError(f"there is no shard {shard}: check data.source") from None
    key = hashlib.sha256(f"{shard} {stat.length} {stat.mtime}".encode()).hexdigest()[:32]
    kept = cache_dir() / "shards" / f"{key}.npy"
    if kept.exists():
        try:
            return np.load(os.fspath(kept))
        except (OSError, ValueError, EOFError):
            pass  # torn: make it again
    table = _read_headers(path, shard)
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=kept.parent)
    with os.fdopen(handle, "wb") as f:
        np.save(f, table)
    os.replace(name, kept)
    return table


def _read_headers(path: epath.Path, shard: str) -> np.ndarray:
    groups: dict[str, list[int]] = {}
    try:
        with path.open("rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
            length = path.stat().length
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                extension = extension.lower()
                kind = "image" if extension in _IMAGES else extension
                if not member.isfile() or not stem or kind not in _KINDS:
                    continue
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                spans = groups.setdefault(f"{folder}/{stem}", [0] * (2 * len(_KINDS)))
                place = 2 * _KINDS.index(kind)
                spans[place : place + 2] = member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"the shard {shard} is torn or no tar file ({error}): fetch it again"
        ) from None
    rows = [spans for spans in groups.values() if spans[0]]
    return np.array(rows, np.int64).reshape(len(rows), 2 * len(_KINDS))
