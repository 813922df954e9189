"""Tables of image paths and captions, alone or in an image folder: CSV, TSV, JSON or Flickr's list.

Each row has the features that the config names (`image` and `caption` by default). Image paths are
relative to the table. A column `split` assigns rows to splits; without it all rows are the training
split. Compressed files (`.gz`) are supported.
"""

import functools
import gzip
import itertools
import logging
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any

from vlm.config import DataConfig
from vlm.data.delimited import Line, read_delimited
from vlm.data.examples import WHERE, Example, check_features, flat_items
from vlm.data.faults import BadSample
from vlm.data.hub_access import SCHEME, check_access
from vlm.data.json_rows import read_json_rows, read_token_list
from vlm.data.layouts import files_of, find_layout, has_split_names
from vlm.data.splits import rows_of_split, split_files, split_value
from vlm.data.storage import read_file, stamp_of
from vlm.data.url_tables import download_advice, url_column
from vlm.errors import DataError, first_line
from vlm.paths import as_path, decode_text, is_remote

SUFFIXES = tuple(
    kind + end
    for kind in (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".token", ".token.txt")
    for end in ("", ".gz")
)

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_URL = re.compile(r"https?://", re.IGNORECASE)
_NUMBERED = re.compile(r"column\d+")  # names of columns without a header
_LOOKED_AT = 8  # rows, to find the image folder and the types of columns

_log = logging.getLogger(__name__)


class TableSource:
    """Source over the rows of a table; images are file paths."""

    def __init__(self, rows: Sequence[Example | BadSample], folder: str, config: DataConfig):
        self._rows, self._folder, self._image = rows, folder, config.image

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        if isinstance(row, BadSample):
            raise row
        path = row[self._image]
        return row | {self._image: path if is_remote(path) else os.path.join(self._folder, path)}


def open_split(config: DataConfig, split: str) -> TableSource:
    """Open the rows of `split` in the table `config.source`, or in the table of that folder.

    A row that cannot be read is a bad sample. DataError if too many are bad, or a wanted feature is
    missing.
    """
    by_file, file = has_split_names(config.source), config.source
    if by_file:
        (file,) = split_files(config.source, split, config.train_split)
    path = _table_of(file)
    rows = _rows(path, config)
    _check(rows, config, path)
    folder = _image_folder(rows, config, path)
    splits = [] if by_file else _splits(rows, config)
    if not splits:
        if split != config.train_split and not by_file:
            raise DataError(
                f"{path} has no column `split`, so there is no split {split!r}: give it one, or "
                "set eval_split=None"
            )
        return TableSource(rows, folder, config)
    chosen = [rows[i] for i in rows_of_split(split, splits, path)]
    if split == config.train_split:  # the training split counts bad rows
        chosen += [row for row in rows if isinstance(row, BadSample)]
    return TableSource(chosen, folder, config)


def list_splits(config: DataConfig) -> list[str] | None:
    """List the splits in the column `split` of a table; None without this column."""
    splits = _splits(_rows(_table_of(config.source), config), config)
    return sorted({own for own in splits if own}) or None


def _splits(rows: Sequence[Example | BadSample], config: DataConfig) -> list[str | None]:
    """Return the split of each row: None if unset, "" for a bad row. Empty without a column."""
    if not any("split" in row for row in rows if isinstance(row, dict)):
        return []
    return [
        "" if isinstance(row, BadSample) else split_value(row.get("split", config.train_split))
        for row in rows
    ]


def _table_of(source: str) -> str:
    """Return the path of a table, or of the table in a folder."""
    if source.startswith(SCHEME):
        check_access(source)
        return source if find_layout(source) is None else files_of(source)[0]
    path = as_path(source)
    if path.is_dir():
        for suffix in SUFFIXES:
            if (path / f"captions{suffix}").exists():
                return os.fspath(path / f"captions{suffix}")
        raise DataError(f"{path} has no captions.csv, captions.tsv or captions.jsonl: write one")
    return os.fspath(path)


def _rows(path: str, config: DataConfig) -> list[Example | BadSample]:
    texts = (config.label,) if config.label else config.captions
    return _read(path, stamp_of(path), config.image, texts, config.data_dir)


@functools.lru_cache(4)  # training and evaluation share the table; faults are logged once
def _read(
    name: str, stamp: str, image: str, texts: tuple[str, ...], data_dir: str | None
) -> list[Example | BadSample]:
    suffix = os.path.splitext(name.removesuffix(".gz").removesuffix(".txt"))[1].lower()
    try:
        data = read_file(name)
    except FileNotFoundError:
        raise DataError(f"there is no table {name}: check data.source") from None
    except OSError as error:
        why = error.strerror or first_line(error)
        raise DataError(f"the table {name} cannot be read ({why}): check data.source") from None
    if name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{name} is a truncated or corrupt gzip file ({error}): write it again"
            ) from None
    text = decode_text(data, name)
    if suffix in _DELIMITERS:
        lines, unit = read_delimited(text, _DELIMITERS[suffix], name), "line"
        rows = _with_header(lines, name, image, texts, data_dir)
    elif suffix == ".token":
        rows, unit = read_token_list(text, name, image, texts[0]), "line"
    else:
        rows, unit = read_json_rows(text, name), "row"
    return [
        row if isinstance(row, BadSample) else _example(*row, f"{unit} {row[0]} of {name}", image)
        for row in rows
    ]


def _example(number: int, row: dict[str, Any], where: str, image: str) -> Example | BadSample:
    """Convert a row to an example; nested fields have names such as `captions/text`."""
    example: Example = {WHERE: where}
    for name, value in row.items():
        example |= flat_items(name, value, image)
    if image not in example:
        return example  # the check of all rows reports missing features
    path = example[image]
    if isinstance(path, dict):  # as Hugging Face `datasets` writes an image
        path = path.get("path")
    if not isinstance(path, str) or not path:
        why = f"{where} names no image in {image} but {path!r}: give the path of its file"
        return BadSample("no image", where, why)
    return example | {image: path}


def _with_header(
    rows: list[Line | BadSample],
    name: str,
    image: str,
    texts: tuple[str, ...],
    data_dir: str | None,
) -> list[tuple[int, dict[str, str]] | BadSample]:
    """Name the columns of rows by the first row; without a header by `_column_names`."""
    if not rows:
        return []
    first = rows[0]
    assert isinstance(first, Line)
    header = first.fields
    folders = [os.path.dirname(name), *([data_dir] if data_dir else [])]
    without = image not in header and (
        _NUMBERED.fullmatch(image) or any(_URL.match(f) or _is_file(f, folders) for f in header)
    )
    if without:
        header = _column_names(rows, name, image, texts, folders)
    elif len(set(header)) < len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise DataError(f"{name} has two columns {twice!r}: give each a name of its own")
    return [
        row
        if isinstance(row, BadSample)
        else (row.number, dict(zip(header, row.fields, strict=True)))
        for row in (rows if without else rows[1:])
    ]


def _column_names(
    rows: list[Line | BadSample], name: str, image: str, texts: tuple[str, ...], folders: list[str]
) -> list[str]:
    """Name the columns of a table without header: column1, column2, ..., or image and caption."""
    looked_at = list(itertools.islice((r.fields for r in rows if isinstance(r, Line)), _LOOKED_AT))
    names = [f"column{number}" for number in range(1, len(looked_at[0]) + 1)]
    if _NUMBERED.fullmatch(image):
        return names
    columns = list(zip(*looked_at, strict=True))
    urls = [i for i, own in enumerate(columns) if all(map(_URL.match, own))]
    files = [i for i, own in enumerate(columns) if any(_is_file(f, folders) for f in own)]
    others = [i for i in range(len(columns)) if i not in urls and i not in files]
    shown = ", ".join(
        f"{column} ({'an address, ' if i in urls else ''}such as {looked_at[0][i][:60]!r})"
        for i, column in enumerate(names)
    )
    if not files:
        fix = "give it a header, and paths of images that exist"
        if urls:
            named = ["url" if i in urls else column for i, column in enumerate(names)]
            if len(others) == 1:
                named[others[0]] = texts[0]
            fix = download_advice(
                DataConfig(name, captions=texts), name, named, "url", header=False
            )
        raise DataError(f"{name} has no header and no images: its columns are {shown}; {fix}")
    if len(files) > 1 or len(others) != 1 or len(texts) != 1:
        raise DataError(
            f"{name} has no header, and its columns are {shown}: name them, for example "
            f'data.image="{names[files[0]]}" and data.captions=("{names[(others or [0])[0]]}",)'
        )
    named = names.copy()
    named[files[0]], named[others[0]] = image, texts[0]
    _log.warning(
        "%s has no header: %s, which has file names, is used as %s, and %s as %s",
        name, names[files[0]], image, names[others[0]], texts[0],
    )  # fmt: skip
    return named


def _check(rows: list[Example | BadSample], config: DataConfig, path: str) -> None:
    """Check all rows against the config."""
    if not rows:
        raise DataError(f"{path} has no rows: give it one for each image")
    bad = [row for row in rows if isinstance(row, BadSample)]
    good = [row for row in rows if isinstance(row, dict)]
    if not good or len(bad) > max(1, config.max_bad_share * len(rows)):
        raise DataError(
            f"{len(bad):,} of the {len(rows):,} rows of {path} cannot be used: {bad[0]}"
        )
    if bad:
        _log.warning("%s of %s rows of %s are broken: %s", len(bad), len(rows), path, bad[0])
    known = {name for row in good for name in row if name != WHERE}
    addresses = [n for n in known if all(_is_url(row.get(n)) for row in good[:_LOOKED_AT])]
    try:
        check_features(config, known, f"the table {path}")
    except DataError as error:
        if config.image in known or not addresses:
            raise
        url = url_column(addresses) or addresses[0]
        advice = download_advice(config, path, sorted(known), url)
        raise DataError(f"{error}; {url} holds addresses: {advice}") from None


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and _URL.match(value) is not None


def _is_file(field: str, folders: Sequence[str]) -> bool:
    """Whether a field is the path of a file, relative to one of `folders`."""
    return len(field) < 4096 and any(os.path.isfile(os.path.join(f, field)) for f in folders)


def _image_folder(rows: list[Example | BadSample], config: DataConfig, path: str) -> str:
    """Find the folder that image paths are relative to: the table's, `data_dir`, or COCO's.

    COCO's captions_val2017.json is in annotations/, and its images in val2017/ beside that.
    """
    beside = os.path.dirname(path)
    named = (row[config.image] for row in rows if isinstance(row, dict))
    images = list(itertools.islice(named, _LOOKED_AT))
    if is_remote(path) or any(is_remote(image) for image in images):
        return beside
    above, own = os.path.dirname(beside), os.path.basename(path).split(".")[0].rpartition("_")[2]
    inner = ("", "images", own, os.path.join("images", own), "flickr30k-images")
    around = (os.path.join(d, i) for d in (beside, above) for i in inner)
    for folder in [beside, *filter(None, [config.data_dir, *around])]:
        if any(os.path.isfile(os.path.join(folder, image)) for image in images):
            if folder != beside:
                _log.warning("the images of %s are read from %s", path, folder)
            return folder
    return beside
