"""Parquet files: a table of image paths, or shards with image bytes.

Row groups can only be read whole, so shuffled random access to files with image bytes is slow.
Training reads these as a stream.
"""

import bisect
import collections
import functools
import itertools
import os
import threading
from collections.abc import Callable, Generator
from typing import Any

from vlm.config import DataConfig
from vlm.data.columns import Columns, import_pyarrow, same_label_names
from vlm.data.examples import Example, Subset
from vlm.data.faults import BadSample
from vlm.data.shards import Record
from vlm.data.splits import named_splits, rows_of_split, split_files, split_value
from vlm.data.storage import expand, open_file, retry
from vlm.data.tar import CorruptFileError
from vlm.errors import DataError, first_line

_ROWS = 64  # converted at a time
_GROUPS = 4  # row groups cached by random access


class ParquetFormat:
    """Stream format of Parquet shards; an offset is a row number."""

    kind = "parquet"

    def __init__(self, config: DataConfig):
        self._config = config

    def read(
        self, shard: str, offset: int, number: int, chunk: int
    ) -> Generator[Record, None, None]:
        """Yield the rows of a shard from row `offset` on.

        Raises:
            OSError, CorruptFileError: the rest cannot be read.
        """
        pyarrow = import_pyarrow()
        with retry(lambda: open_file(shard)) as f:
            try:
                file = pyarrow.parquet.ParquetFile(f, buffer_size=chunk, pre_buffer=False)
                columns = Columns(file.schema_arrow, self._config, shard)
                row = 0
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if row + count <= offset:
                        row += count
                        continue
                    batches = file.iter_batches(_ROWS, row_groups=[group], columns=columns.wanted)
                    for values in itertools.chain.from_iterable(b.to_pylist() for b in batches):
                        if row >= offset:
                            yield Record(_example(columns, values, shard, row), row + 1)
                        row += 1
            except pyarrow.ArrowException as error:
                raise CorruptFileError(str(error)) from None


class ParquetSource:
    """Source over the rows of Parquet files; thread-safe.

    A file is opened for each read of a row group, since two threads in one open file crash Arrow.
    """

    def __init__(self, names: list[str], config: DataConfig):
        self._names, self._config = names, config
        self._metadata, self._columns = [], []
        counts, self._groups, self._starts = [], [], []
        for number, name in enumerate(names):
            metadata, schema = _footer(name)
            columns = Columns(schema, config, name)
            columns.check()
            self._metadata.append(metadata)
            self._columns.append(columns)
            start = 0
            for group in range(metadata.num_row_groups):
                self._starts.append(start)
                start += metadata.row_group(group).num_rows
                counts.append(metadata.row_group(group).num_rows)
                self._groups.append((number, group))
        self._ends = list(itertools.accumulate(counts))
        self.label_names = same_label_names(self._columns, config)
        self._cache = _Cache()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        at = bisect.bisect_right(self._ends, index)
        number = self._groups[at][0]
        row = index - (self._ends[at - 1] if at else 0)
        values = self._cache.get(at, self._read).slice(row, 1).to_pylist()[0]
        where = f"{self._names[number]}: row {self._starts[at] + row}"
        return self._columns[number].example(values, where)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_cache": _Cache()}

    def _read(self, at: int) -> Any:
        number, group = self._groups[at]
        pyarrow, name = import_pyarrow(), self._names[number]
        try:
            with retry(lambda: open_file(name)) as f:
                file = pyarrow.parquet.ParquetFile(f, metadata=self._metadata[number])
                return file.read_row_group(group, columns=self._columns[number].wanted)
        except (pyarrow.ArrowException, OSError) as error:
            where = f"{name}: row group {group}"
            why = f"row group {group} of {name} cannot be read ({first_line(error)})"
            raise BadSample("failed read", where, why) from None


class _Cache:
    """Cache of the last row groups; of several threads only one reads a group."""

    def __init__(self):
        self._groups: collections.OrderedDict[int, _Group] = collections.OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def get(self, at: int, read: Callable[[int], Any]) -> Any:
        """Return row group `at`; call `read` if it is not cached."""
        if self._pid != os.getpid():  # after a fork, a lock may be held by a thread of the parent
            self.__init__()
        with self._lock:
            group = self._groups.setdefault(at, _Group())
            self._groups.move_to_end(at)
            while len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        with group.lock:
            if group.table is None:
                group.table = read(at)
            return group.table


class _Group:
    def __init__(self):
        self.lock, self.table = threading.Lock(), None


def open_parquet(config: DataConfig, split: str) -> Any:
    """Open the rows of `split`, by `{split}` in the file names or by a column `split`.

    Raises:
        DataError: no such file or split, pyarrow is not installed, or a feature is missing.
    """
    splits = _split_column(config.source)
    files = (
        expand(config.source) if splits else split_files(config.source, split, config.train_split)
    )
    source = ParquetSource(files, config)
    if splits:
        return Subset(source, rows_of_split(split, splits, config.source))
    if not len(source):
        raise DataError(f"{config.source} has no rows: give it one for each image")
    return source


def parquet_splits(config: DataConfig) -> list[str] | None:
    """List the splits, by a column `split` or by the file names; None without either."""
    if "{split}" in config.source:
        return named_splits(config.source)
    return sorted({own for own in _split_column(config.source) if own}) or None


def _split_column(pattern: str) -> list[str | None]:
    """The split of each row, None where it has none.

    Empty where no file has the column `split`, or `{split}` is in their names in its place.
    """
    files = [] if "{split}" in pattern else expand(pattern)
    footers = [_footer(name) for name in files]
    if not any("split" in schema.names for _, schema in footers):
        return []
    found: list[str | None] = []
    for name, (metadata, schema) in zip(files, footers, strict=True):
        if "split" in schema.names:
            found += [split_value(row["split"]) for row in read_columns(name, ["split"])]
        else:
            found += [None] * metadata.num_rows
    return found


@functools.lru_cache(16)
def holds_images(config: DataConfig) -> bool:
    """Whether Parquet files contain image bytes, not only paths.

    Raises:
        DataError: the first file cannot be read.
    """
    columns = _first_columns(config)
    columns.check()
    return not columns.image_is_path


def stream_label_names(config: DataConfig) -> list[str] | None:
    """Return the class names of the training split, if its first file has them."""
    return _first_columns(config).label_names


def _first_columns(config: DataConfig) -> Columns:
    name = split_files(config.source, config.train_split, config.train_split)[0]
    return Columns(_footer(name)[1], config, name)


def count_rows(path: str) -> int:
    """Return the number of rows of a Parquet file.

    Raises:
        DataError: it is missing, or not a Parquet file.
    """
    return _footer(path)[0].num_rows


def read_columns(path: str, columns: list[str]) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file, with the `columns` that exist.

    Raises:
        OSError: it cannot be read.
        DataError: pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    with retry(lambda: open_file(path)) as f:
        try:
            file = pyarrow.parquet.ParquetFile(f)
            known = [name for name in columns if name in file.schema_arrow.names]
            return file.read(columns=known).to_pylist()
        except pyarrow.ArrowException as error:
            raise OSError(f"{path} cannot be read as Parquet ({error})") from None


def _footer(name: str) -> tuple[Any, Any]:
    """Read the metadata and the schema of a Parquet file.

    Raises:
        DataError: it is missing, or not a Parquet file.
    """
    pyarrow = import_pyarrow()
    try:
        with retry(lambda: open_file(name)) as f:
            file = pyarrow.parquet.ParquetFile(f)
            return file.metadata, file.schema_arrow
    except FileNotFoundError:
        raise DataError(f"there is no table {name}: check data.source") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read as Parquet ({error}): check data.source") from None


def _example(columns: Columns, values: dict[str, Any], name: str, row: int) -> Example | BadSample:
    try:
        return columns.example(values, f"{name}: row {row}")
    except BadSample as bad:
        return bad
