"""Parquet files: a table of image paths, or shards with image bytes.

Row groups can only be read whole, so shuffled random access to files with image bytes is slow.
Training reads these as a stream.
"""

import collections
import functools
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow

from vlm.config import DataConfig
from vlm.data.columns import Columns, Groups, same_label_names
from vlm.data.examples import Example, Subset
from vlm.data.faults import BadSample
from vlm.data.layouts import files_of, has_split_names
from vlm.data.parquet_file import check_footer, open_parquet
from vlm.data.shards import Record, Records
from vlm.data.splits import rows_of_split, split_files, split_value
from vlm.data.tar import CorruptFileError
from vlm.errors import DataError, first_line
from vlm.paths import is_remote

_ROWS = 64  # converted at a time
_FOOTERS = 64  # of remote files read at the same time
_GROUPS = 4  # row groups cached by random access


class ParquetFormat:
    """Stream format of Parquet shards; an offset is a row number.

    A part is a row group, several, or one of `visits` slices of one. Arrow can only decode a row
    group from its start, so each visit decodes it again.
    """

    kind = "parquet"

    def __init__(self, config: DataConfig):
        self._config, self.visits = config, 1
        self.images = True  # else only columns of texts are read

    def read(
        self, shard: str, offset: int, number: int, chunk: int, part: int = 0, parts: int = 1
    ) -> Records:
        """Yield the rows of a part of a shard, from row `offset` on."""
        try:
            with open_parquet(shard, buffer_size=chunk, pre_buffer=False) as file:
                columns = Columns(file.schema_arrow, self._config, shard)
                wanted = columns.wanted if self.images else columns.texts
                groups, start, end = _rows_of_part(file.metadata, part, parts, self.visits)
                start = max(start, offset)
                for group, row in groups:
                    if row + file.metadata.row_group(group).num_rows <= start:
                        continue
                    batches = file.iter_batches(  # lanes are read by threads already
                        _ROWS, row_groups=[group], columns=wanted, use_threads=False
                    )
                    for batch in batches:
                        skipped = min(max(0, start - row), len(batch))
                        taken = batch.slice(skipped, max(0, end - row - skipped))
                        for i, values in enumerate(taken.to_pylist(), row + skipped):
                            if columns.failed(values):
                                continue
                            yield Record(_example(columns, values, shard, i), i + 1)
                        row += len(batch)
                        if row >= end:
                            return
        except pyarrow.ArrowException as error:
            raise CorruptFileError(str(error)) from None


class ParquetSource:
    """Source over the rows of Parquet files; thread-safe.

    A file is opened for each read of a row group, since two threads in one open file crash Arrow.
    """

    def __init__(self, names: list[str], config: DataConfig, known: dict[str, Any] | None = None):
        self._names = self.files = names
        known = known or {}
        complete = known.keys() >= set(names)
        footers = [known[name] for name in names] if complete else _footers(names)
        self._metadata = [metadata for metadata, _ in footers]
        pairs = zip(names, footers, strict=True)
        self._columns = [Columns(schema, config, name) for name, (_, schema) in pairs]
        for columns in self._columns:
            columns.check()
        self.has_failed = any(columns.has_failed for columns in self._columns)
        self.label_names = same_label_names(self._columns, config)
        self._places = [
            (n, g) for n, m in enumerate(self._metadata) for g in range(m.num_row_groups)
        ]
        counts = [self._metadata[n].row_group(g).num_rows for n, g in self._places]
        self._groups = Groups(counts)
        self._files = Groups([metadata.num_rows for metadata in self._metadata])
        self._pid: int | None = None

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Example:
        group, row = self._groups.find(index)
        values = self._cached(group).slice(row, 1).to_pylist()[0]
        number, row = self._files.find(index)
        return self._columns[number].example(values, f"{self._names[number]}: row {row}")

    def scan(self) -> Iterator[Example | BadSample]:
        """Yield all examples without their images: only columns of texts are read."""
        row, last = 0, -1
        for place, (number, group) in enumerate(self._places):
            row, last = 0 if number != last else row, number
            columns, name = self._columns[number], self._names[number]
            count = self._metadata[number].row_group(group).num_rows
            try:
                rows: list[Any] = self._read(place, columns.texts).to_pylist()
            except BadSample as fault:
                rows = [fault] * count
            for i, values in enumerate(rows, row):
                bad = isinstance(values, BadSample)
                yield values if bad else _example(columns, values, name, i)
            row += count

    def downloaded(self) -> list[int] | None:
        """Return the rows that img2dataset could download; None if it could all."""
        found = zip(self._names, self._columns, strict=True)
        failed = [
            columns.failed(row) for name, columns in found for row in read_columns(name, ["status"])
        ]
        if not any(failed):
            return None
        log = logging.getLogger(__name__)
        where = self._names[0] + (", ..." if len(self._names) > 1 else "")
        log.warning("%s: %s of %s rows could not be downloaded, and are left out",
                    where, f"{sum(failed):,}", f"{len(failed):,}")  # fmt: skip
        return [i for i, gone in enumerate(failed) if not gone]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pid": None, "_cache": None, "_lock": None}

    def _cached(self, group: int) -> Any:
        """Return a row group from the cache; of several threads only one reads it."""
        if self._pid != os.getpid():  # after a fork, a lock may be held by a thread of the parent
            self._cache: collections.OrderedDict[int, tuple[threading.Lock, list]]
            self._cache, self._lock = collections.OrderedDict(), threading.Lock()
            self._pid = os.getpid()
        with self._lock:
            lock, held = self._cache.setdefault(group, (threading.Lock(), []))
            self._cache.move_to_end(group)
            while len(self._cache) > _GROUPS:
                self._cache.popitem(last=False)
        with lock:
            if not held:
                held.append(self._read(group, self._columns[self._places[group][0]].wanted))
            return held[0]

    def _read(self, place: int, columns: list[str]) -> Any:
        number, group = self._places[place]
        name = self._names[number]
        try:
            with open_parquet(name, metadata=self._metadata[number]) as file:
                return file.read_row_group(group, columns=columns)
        except (pyarrow.ArrowException, OSError) as error:
            where = f"{name}: row group {group}"
            why = f"row group {group} of {name} cannot be read ({first_line(error)})"
            raise BadSample.failed_read(where, why, error) from None


def open_split(config: DataConfig, split: str) -> Any:
    """Open the rows of a split, by `{split}` in the file names or by a column `split`."""
    splits, footers = _split_column(config.source)
    files = (
        files_of(config.source) if splits else split_files(config.source, split, config.train_split)
    )
    source = ParquetSource(files, config, footers)
    if splits:
        return Subset(source, rows_of_split(split, splits, config.source))
    if source.has_failed and (rows := source.downloaded()) is not None:
        return Subset(source, rows)
    if not len(source):
        raise DataError(f"{config.source} has no rows: give it one for each image")
    return source


def list_splits(config: DataConfig) -> list[str] | None:
    """List the splits in a column `split`; None without this column."""
    return sorted({own for own in _split_column(config.source)[0] if own}) or None


def _split_column(pattern: str) -> tuple[list[str | None], dict[str, Any]]:
    """The split of each row, None where it has none, and the footers of all files, if read.

    No rows where no file has the column `split`, or the names of the files have the splits.
    """
    files = [] if has_split_names(pattern) else files_of(pattern)
    footers = dict(zip(files, _footers(files), strict=True))
    if not any("split" in schema.names for _, schema in footers.values()):
        return [], footers
    values: list[str | None] = []
    for name in files:
        metadata, schema = footers[name]
        if "split" in schema.names:
            values += [split_value(row["split"]) for row in read_columns(name, ["split"])]
        else:
            values += [None] * metadata.num_rows
    return values, footers


@functools.lru_cache(16)
def holds_images(config: DataConfig) -> bool:
    """Whether Parquet files contain image bytes, not only paths."""
    columns = _first_columns(config)
    columns.check()
    return not columns.image_is_path


def check_columns(name: str, config: DataConfig) -> None:
    """Raise a DataError if a file lacks a wanted feature, or has it in another form."""
    Columns(_footer(name)[1], config, name).check()


def stream_label_names(config: DataConfig) -> list[str] | None:
    """Return the class names of the training split, if its first file has them."""
    return _first_columns(config).label_names


def _first_columns(config: DataConfig) -> Columns:
    name = split_files(config.source, config.train_split, config.train_split)[0]
    return Columns(_footer(name)[1], config, name)


class Layout(NamedTuple):
    """Rows and row groups of a Parquet file, and the bytes of its columns for training."""

    rows: int
    groups: int
    size: int


def layout_of(path: str, config: DataConfig) -> Layout:
    """Return the layout of a Parquet file."""
    metadata, schema = _footer(path)
    wanted = Columns(schema, config, path).wanted
    size = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        size += sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] in wanted
        )
    return Layout(metadata.num_rows, metadata.num_row_groups, size)


def _rows_of_part(
    metadata: Any, part: int, parts: int, visits: int
) -> tuple[list[tuple[int, int]], int, int]:
    """Return the row groups of a part, each with its first row, and the rows of the part."""
    part, visit = divmod(part, visits)
    parts //= visits
    first, end = (-(-metadata.num_row_groups * p // parts) for p in (part, part + 1))
    counts = [metadata.row_group(group).num_rows for group in range(end)]
    starts = list(itertools.accumulate(counts, initial=0))
    rows = starts[end] - starts[first]
    bounds = (starts[first] - (-rows * v // visits) for v in (visit, visit + 1))
    return [(group, starts[group]) for group in range(first, end)], *bounds


def read_columns(path: str, columns: list[str]) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file, with the `columns` that exist; OSError if it cannot."""
    try:
        with open_parquet(path) as file:
            known = [name for name in columns if name in file.schema_arrow.names]
            return file.read(columns=known).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(f"{path} cannot be read as Parquet ({first_line(error)})") from None


def _footer(name: str, *, fresh: bool = False) -> tuple[Any, Any]:
    """Read the metadata and the schema of a Parquet file; DataError if it cannot.

    With `fresh`, a remote file that was read before is asked if it has changed.
    """
    try:
        if fresh:
            check_footer(name)
        with open_parquet(name) as file:
            return file.metadata, file.schema_arrow
    except FileNotFoundError:
        raise DataError(f"there is no table {name}: check data.source") from None
    except (pyarrow.ArrowException, OSError) as error:
        why = first_line(error)
        raise DataError(f"{name} cannot be read as Parquet ({why}): check data.source") from None


def _footers(names: list[str]) -> list[tuple[Any, Any]]:
    """Read the footers of files: remote ones at the same time, local ones are faster in turn."""
    if not any(map(is_remote, names)):
        return [_footer(name) for name in names]
    with ThreadPoolExecutor(_FOOTERS) as pool:
        return list(pool.map(functools.partial(_footer, fresh=True), names))


def _example(columns: Columns, values: dict[str, Any], name: str, row: int) -> Example | BadSample:
    try:
        return columns.example(values, f"{name}: row {row}")
    except BadSample as bad:
        return bad
