"""Parquet files: of image paths as a table, of image bytes as shards of a stream.

A row group is read whole, so random access to files with the images inside is quick in order and
slow in a shuffled one: training reads those as a stream.
"""

import bisect
import collections
import functools
import itertools
import os
from collections.abc import Generator
from typing import Any

from vlm.config import DataConfig
from vlm.data.arrow import import_pyarrow, plain
from vlm.data.examples import Example, check_features, wanted_features
from vlm.data.shards import Record
from vlm.data.splits import find_split, named_splits, split_files
from vlm.data.storage import expand, open_file
from vlm.data.tar import Torn
from vlm.errors import DataError
from vlm.paths import is_remote

_ROWS = 64  # made at a time
_GROUPS = 4  # row groups that random access keeps


class ParquetFormat:
    """How a stream reads Parquet shards; an offset is the number of a row."""

    kind = "parquet"

    def __init__(self, config: DataConfig):
        self._config = config

    def read(
        self, shard: str, offset: int, number: int, chunk: int
    ) -> Generator[Record, None, None]:
        """The rows of a shard from row `offset` on.

        Raises:
            OSError, Torn: where it cannot be read on.
        """
        pyarrow = import_pyarrow()
        with open_file(shard) as f:
            try:
                file = pyarrow.parquet.ParquetFile(f, buffer_size=chunk, pre_buffer=False)
                columns = _columns(file, self._config)
                row = 0
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if row + count <= offset:
                        row += count
                        continue
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                        for values in batch.to_pylist():
                            if row >= offset:
                                where = f"{shard}: row {row}"
                                values = _beside(values, self._config, shard)
                                yield Record(plain(values, self._config, where, None), row + 1)
                            row += 1
            except pyarrow.ArrowInvalid as error:
                raise Torn(str(error)) from None


class ParquetSource:
    """The rows of some Parquet files, by number."""

    def __init__(self, names: list[str], config: DataConfig):
        self._names, self._config = names, config
        self._open()
        counts, self._groups = [], []
        for number, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                counts.append(file.metadata.row_group(group).num_rows)
                self._groups.append((number, group))
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        at = bisect.bisect_right(self._ends, index)
        table = self._kept.get(at)
        if table is None:
            number, group = self._groups[at]
            file = self._files[number]
            table = file.read_row_group(group, columns=_columns(file, self._config))
            self._kept[at] = table
            while len(self._kept) > _GROUPS:
                self._kept.popitem(last=False)
        row = index - (self._ends[at - 1] if at else 0)
        values = table.slice(row, 1).to_pylist()[0]
        name = self._names[self._groups[at][0]]
        return plain(_beside(values, self._config, name), self._config, f"{name}: row {row}", None)

    @property
    def columns(self) -> list[str]:
        """The names of the features."""
        return self._files[0].schema_arrow.names

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def _open(self) -> None:
        pyarrow = import_pyarrow()
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._files = []
        for name in self._names:
            try:
                self._files.append(pyarrow.parquet.ParquetFile(open_file(name)))
            except FileNotFoundError:
                raise DataError(f"there is no table {name}: check data.source") from None
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{name} cannot be read as Parquet ({error}): check data.source"
                ) from None


class _Split:
    """The rows of one split of a table that has a column for it."""

    def __init__(self, source: ParquetSource, rows: list[int]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._rows[index]]


def open_parquet(config: DataConfig, split: str) -> Any:
    """The rows of `split`: of the files named by `{split}`, or by the column `split` of a table.

    Raises:
        DataError: no such file or split, pyarrow is not installed, or a feature is missing.
    """
    said = _split_column(config.source)
    files = expand(config.source) if said else split_files(config.source, split, config.train_split)
    source = ParquetSource(files, config)
    check_features(config, source.columns, f"the table {config.source}")
    if said:
        split = find_split(split, set(said), config.source)
        return _Split(source, [i for i, value in enumerate(said) if value == split])
    if not len(source):
        raise DataError(f"{config.source} has no rows: give it one for each image")
    return source


def parquet_splits(config: DataConfig) -> list[str] | None:
    """The splits by the column `split` or by the files' names; None where there is neither."""
    if "{split}" in config.source:
        return named_splits(config.source)
    return sorted(set(_split_column(config.source))) or None


def _split_column(pattern: str) -> list[str]:
    """The value of the column `split` of each row; empty where there is none, or in its place
    `{split}` in the names of the files."""
    files = [] if "{split}" in pattern else expand(pattern)
    rows = (row for name in files for row in read_columns(name, ["split"]))
    return [str(row["split"]) for row in rows if "split" in row]


@functools.lru_cache(16)
def holds_images(config: DataConfig) -> bool:
    """Whether the images of Parquet files lie inside them, and not only their paths.

    Raises:
        DataError: the first file cannot be read.
    """
    pyarrow = import_pyarrow()
    files = split_files(config.source, config.train_split, config.train_split)
    source = ParquetSource(files[:1], config)
    check_features(config, source.columns, f"the table {config.source}")
    kind = source._files[0].schema_arrow.field(config.image).type
    return not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def read_columns(path: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of a Parquet file with those of `columns` that it has.

    Raises:
        OSError: it cannot be read.
        DataError: pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    with open_file(path) as f:
        try:
            file = pyarrow.parquet.ParquetFile(f)
            known = [name for name in columns if name in file.schema_arrow.names]
            return file.read(columns=known).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise OSError(f"{path} cannot be read as Parquet ({error})") from None


def _columns(file: Any, config: DataConfig) -> list[str]:
    return [n for n in [config.image, *wanted_features(config)] if n in file.schema_arrow.names]


def _beside(values: dict[str, Any], config: DataConfig, name: str) -> dict[str, Any]:
    """The row with a path that is relative to its table made whole."""
    image = values.get(config.image)
    if isinstance(image, str) and not is_remote(image):
        values[config.image] = os.path.join(os.path.dirname(name), image)
    return values
