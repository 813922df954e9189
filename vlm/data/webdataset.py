"""WebDataset shards as img2dataset writes them: what the members of an example become.

In a shard (github.com/webdataset/webdataset) files that share a name up to the first dot are one
example: `000017.jpg`, `000017.txt`, `000017.json`. Here extensions become features: an image is
`config.image`, `.txt` is the first of `config.captions`, the fields of `.json` keep their names,
and any other extension that the config names is text. A `.parquet` beside a shard, as img2dataset
writes one, adds its columns by `key`.
"""

import functools
import json
from collections.abc import Generator
from typing import Any

from vlm.config import DataConfig
from vlm.data import tar
from vlm.data.examples import WHERE, Example, wanted_features
from vlm.data.faults import BadSample
from vlm.data.shards import Record
from vlm.data.storage import FrontToBack

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2")


class TarFormat:
    """How a stream reads tar shards; an offset is the byte at which an example begins."""

    kind = "tar"

    def __init__(self, config: DataConfig, *, sidecar: bool = False, contents: bool = True):
        self._config, self._sidecar = config, sidecar
        self._wanted = wanted_extensions(config) if contents else frozenset()

    def read(
        self, shard: str, offset: int, number: int, chunk: int
    ) -> Generator[Record, None, None]:
        """The examples of a shard from the one that begins at `offset`.

        Raises:
            OSError, Torn: where it cannot be read on.
        """
        more = sidecar_of(shard, self._config) if self._sidecar else None
        file = FrontToBack(shard, offset, chunk)
        try:
            for group in tar.groups(file, self._wanted):
                try:
                    example = example_of(group.parts, self._config, shard, group.key, more)
                except BadSample as bad:
                    example = bad
                yield Record(example, group.end)
        finally:
            file.close()


def wanted_extensions(config: DataConfig) -> frozenset[str]:
    """The extensions of the members that are read."""
    return frozenset([*IMAGES, "txt", "json", *wanted_features(config)])


def example_of(
    parts: dict[str, bytes],
    config: DataConfig,
    shard: str,
    key: str,
    sidecar: dict[str, dict[str, Any]] | None = None,
) -> Example:
    """The example that some members of a tar file make.

    Raises:
        BadSample: there is no image, or a text that is none.
    """
    where = f"{shard}: {key}"
    image = next((parts[extension] for extension in IMAGES if extension in parts), None)
    if image is None:
        raise BadSample("no image", where, f"{where} has no image")
    example: Example = {}
    try:
        if "json" in parts:
            fields = json.loads(parts["json"])
            if not isinstance(fields, dict):
                raise ValueError("the JSON is not an object with named fields")
            example |= fields
        for feature in wanted_features(config):
            if feature in parts and feature not in IMAGES:
                example[feature] = parts[feature].decode().strip()
        if "txt" in parts and config.captions:
            example[config.captions[0]] = parts["txt"].decode().strip()
    except ValueError as error:  # of JSON and of UTF-8
        why = f"the text of {where} cannot be read: {error}"
        raise BadSample("broken text", where, why) from None
    if sidecar is not None:
        example = sidecar.get(key.rpartition("/")[2], {}) | example
    example[config.image] = image
    example[WHERE] = where
    return example


@functools.lru_cache(2)
def sidecar_of(shard: str, config: DataConfig) -> dict[str, dict[str, Any]]:
    """The rows of the `.parquet` beside a shard, by their key: the features that are wanted.

    Raises:
        OSError: it cannot be read.
        DataError: pyarrow is not installed.
    """
    from vlm.data.parquet import read_columns

    path = sidecar_path(shard)
    rows = read_columns(path, ["key", *wanted_features(config)])
    return {str(row.pop("key")): row for row in rows}


def sidecar_path(shard: str) -> str:
    """Where img2dataset puts the table of a shard."""
    return shard.removesuffix(".tar") + ".parquet"
