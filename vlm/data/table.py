"""A table of image paths and captions: .csv, .tsv or .jsonl, alone or inside an image folder.

Each row has the features that the config names (`image` and `caption` by default); image paths are
relative to the table. A column `split` says which split a row belongs to; without it all
rows are the training split.
"""

import csv
import io
import json
from typing import Any

from etils import epath

from vlm.config import DataConfig
from vlm.data.examples import check_features
from vlm.data.splits import find_split
from vlm.errors import DataError
from vlm.paths import as_path, is_remote

SUFFIXES = (".csv", ".tsv", ".jsonl")


class TableSource:
    """Rows of a table; the image of a row is the path of its file."""

    def __init__(self, rows: list[dict[str, Any]], folder: epath.Path, config: DataConfig):
        self._rows, self._folder, self._image = rows, folder, config.image

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self._rows[index])
        path = row[self._image]
        row[self._image] = path if is_remote(path) else str(self._folder / path)
        return row


def open_table(config: DataConfig, split: str) -> TableSource:
    """The rows of `split` in the table that `config.source` names, or in its folder's table.

    Raises:
        DataError: no such table, a row that is not like the others, or an empty split.
    """
    path = _table_of(as_path(config.source))
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path} has no rows: give it one for each image")
    for number, row in enumerate(rows, 1):
        check_features(config, list(row), f"row {number} of {path}")
        if not isinstance(row[config.image], str) or not row[config.image]:
            raise DataError(f"row {number} of {path} names no image: give the path of its file")
    splits = [str(row.get("split", config.train_split)) for row in rows]
    if not any("split" in row for row in rows) and split != config.train_split:
        raise DataError(
            f"{path} has no column `split`, so there is no split {split!r}: give it one, or set "
            "eval_split=None"
        )
    split = find_split(split, set(splits), str(path))
    chosen = [row for row, own in zip(rows, splits, strict=True) if own == split]
    return TableSource(chosen, path.parent, config)


def table_splits(config: DataConfig) -> list[str] | None:
    """The splits in the column `split` of a table; None where it has no such column."""
    rows = _rows(_table_of(as_path(config.source)))
    if not any("split" in row for row in rows):
        return None
    return sorted({str(row.get("split", config.train_split)) for row in rows})


def _table_of(path: epath.Path) -> epath.Path:
    if path.is_dir():
        for suffix in SUFFIXES:
            if (path / f"captions{suffix}").exists():
                return path / f"captions{suffix}"
        raise DataError(f"{path} has no captions{', captions'.join(SUFFIXES)}: write one there")
    if not path.exists():
        raise DataError(f"there is no table {path}: check data.source")
    return path


def _rows(path: epath.Path) -> list[dict[str, Any]]:
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)


def _text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from None


def _read_csv(path: epath.Path) -> list[dict[str, Any]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = list(csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter))
    for number, row in enumerate(rows, 2):  # the header is line 1
        if None in row or None in row.values():
            raise DataError(
                f"line {number} of {path} has another number of fields than the header: quote "
                "captions that contain the delimiter"
            )
    return rows


def _read_jsonl(path: epath.Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {path} is not an object with named fields")
        rows.append(row)
    return rows
