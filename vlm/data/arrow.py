"""Memory-mapped Arrow files, as saved by Hugging Face `datasets` (which is not needed).

A source is a folder of `save_to_disk`, with one split or several, or the `.arrow` files themselves.
The module `columns` converts columns to features.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.ipc

from vlm.config import DataConfig
from vlm.data.columns import Columns, Groups, same_label_names
from vlm.data.examples import Example
from vlm.data.faults import BadSample
from vlm.data.splits import find_split, split_files
from vlm.errors import DataError
from vlm.paths import as_path, is_remote


class ArrowSource:
    """Source over the rows of Arrow files; only the pages of a requested row are read."""

    def __init__(self, files: list[str], config: DataConfig, features: Any = None):
        self.files, self._config, self._features = files, config, features
        self._open()

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Example:
        example = self._example(index)
        if isinstance(example, BadSample):
            raise example
        return example

    def _example(self, index: int, *, images: bool = True) -> Example | BadSample:
        number, row = self._groups.find(index)
        columns, batch = self._batches[number]
        where = f"row {index} of {self._config.source}"
        try:
            names = batch.schema.names if images else columns.texts
            values = {name: _value(batch.column(name)[row]) for name in names}
        except Exception as error:  # damaged pages
            return BadSample("broken row", where, f"{where} cannot be read ({error})")
        try:
            return columns.example(values, where)
        except BadSample as bad:
            return bad

    def scan(self) -> Iterator[Example | BadSample]:
        """Yield all examples without their images."""
        for index in range(len(self)):
            yield self._example(index, images=False)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_batches", "_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def _open(self) -> None:
        self._batches: list[tuple[Columns, Any]] = []
        tables = []
        for name in self.files:
            try:
                mapped = pyarrow.memory_map(name)
                try:
                    table = pyarrow.ipc.open_stream(mapped).read_all()
                except pyarrow.ArrowInvalid:  # Arrow's other file format
                    table = pyarrow.ipc.open_file(mapped).read_all()
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{name} cannot be read as Arrow ({error}): check data.source"
                ) from None
            columns = Columns(table.schema, self._config, name, self._features)
            columns.check()
            tables.append(columns)
            self._batches += [(columns, batch) for batch in table.to_batches() if batch.num_rows]
        self.label_names = same_label_names(tables, self._config)
        self._groups = Groups([batch.num_rows for _, batch in self._batches])


def open_split(config: DataConfig, split: str) -> ArrowSource:
    """Open the rows of a split; DataError if it, a file or a wanted feature is missing."""
    if is_remote(config.source):
        raise DataError(
            f"Arrow files are mapped into memory, so {config.source} must lie on this machine's "
            "disk: copy it, or stream Parquet files instead"
        )
    folder = as_path(config.source)
    features = None
    if folder.is_dir():
        files, info = _saved(folder, config, split)
        features = info.get("features")
    else:
        files = split_files(config.source, split, config.train_split)
    source = ArrowSource(files, config, features)
    if not len(source):
        raise DataError(f"{config.source} has no rows of split {split!r}: check data.source")
    return source


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except ValueError:  # nanoseconds, which Python's types do not support
        return scalar.cast("string").as_py()


def list_splits(config: DataConfig) -> list[str] | None:
    """List the splits in a folder of `save_to_disk`; None if it is a single split."""
    several = as_path(config.source) / "dataset_dict.json"
    return json.loads(several.read_text())["splits"] if several.exists() else None


def _saved(folder: Any, config: DataConfig, split: str) -> tuple[list[str], dict[str, Any]]:
    known = list_splits(config)
    if known is not None:
        folder = folder / find_split(split, known, os.fspath(folder))
    elif split != config.train_split:
        raise DataError(
            f"{folder} has one split and no {split!r}: set eval_split=None, or name its folder"
        )
    try:
        state = json.loads((folder / "state.json").read_text())
        if state.get("_indices_data_files"):
            raise ValueError("its rows were selected or shuffled by a list of indices")
        files = [os.fspath(folder / file["filename"]) for file in state["_data_files"]]
        info = json.loads((folder / "dataset_info.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} was not saved by the library datasets ({error}): save it again"
        ) from None
    return files, info
