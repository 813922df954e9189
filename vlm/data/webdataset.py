"""WebDataset shards as img2dataset writes them: what the members of an example become.

In a shard (github.com/webdataset/webdataset) files that share a name up to the first dot are one
example: `000017.jpg`, `000017.txt`, `000017.json`. Here extensions become features: an image is
`config.image`, `.txt` is the first of `config.captions`, the fields of `.json` keep their names,
and any other extension that the config names is text. A `.parquet` beside a shard, as img2dataset
writes one, adds its columns by `key`.
"""

import json
from collections.abc import Generator
from typing import Any

from vlm.config import DataConfig
from vlm.data import tar
from vlm.data.examples import WHERE, Example, wanted_features
from vlm.data.faults import BadSample
from vlm.data.shards import Record
from vlm.data.sidecar import read_sidecar
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
        rows = read_sidecar(shard, self._config) if self._sidecar else {}
        file = FrontToBack(shard, offset, chunk)
        try:
            for group in tar.groups(file, self._wanted):
                try:
                    more = rows.get(stem_of(group.key))
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
    more: dict[str, Any] | None = None,
) -> Example:
    """The example that some members of a tar file make, and `more` features of a table beside it.

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
    example = (more or {}) | example
    example[config.image] = image
    example[WHERE] = where
    return example


def stem_of(key: str) -> str:
    """The name by which a table beside the shard knows an example: without its folder."""
    return key.rpartition("/")[2]
