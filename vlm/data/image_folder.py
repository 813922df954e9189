"""Image folders of Hugging Face `datasets`: a `metadata` table beside the images."""

import contextlib

from vlm.config import DataConfig
from vlm.data.examples import Source
from vlm.data.faults import BadSample
from vlm.data.splits import NAMES
from vlm.data.storage import list_files
from vlm.data.table import SUFFIXES, open_split
from vlm.errors import DataError
from vlm.paths import as_path

IMAGE = "file_name"  # column of image paths


def metadata_table(source: str) -> str | None:
    """Return the `data.source` of the metadata table in a folder; None if there is none.

    The table is `metadata.csv` or another table format. Split folders have one each, which
    `{split}` stands for. A table without the column `file_name` is another file of that name.

    Raises:
        DataError: one table for folders that are named as splits.
    """
    folder = as_path(source)
    if not folder.is_dir():
        return None
    splits = [p.name for p in folder.iterdir() if p.is_dir() and p.name.lower() in NAMES]
    for suffix in SUFFIXES:
        table, pattern = folder / f"metadata{suffix}", f"{source.rstrip('/')}/{{split}}"
        if table.exists() and IMAGE in columns_of(str(table)):
            if splits:
                raise DataError(
                    f"{table} is one table for the folders {', '.join(sorted(splits))}: give it a "
                    f"column `split` and name it with data.source, and data.image={IMAGE!r}, or "
                    "write a table in each folder"
                )
            return str(table)
        files = list_files(f"{folder}/*/metadata{suffix}") if splits else []
        if files and IMAGE in columns_of(files[0]):
            return f"{pattern}/metadata{suffix}"
    return None


def columns_of(table: str) -> list[str]:
    """List the columns of a table; empty if it has no column of images."""
    config = DataConfig(source=table, image=IMAGE, captions=(IMAGE,), eval_split=None)
    try:
        rows: Source = open_split(config, config.train_split)
    except DataError:
        return []
    for number in range(len(rows)):
        with contextlib.suppress(BadSample):
            return [name for name in rows[number] if not name.startswith("\0")]
    return []
