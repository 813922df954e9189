"""Advice for tables of image addresses, such as CC12M and LAION: how to download the images."""

import os
import re
import shlex
from collections.abc import Collection

from vlm.config import DataConfig

_URLS = re.compile(r"(.*_)?(url|urls|link|image_link)", re.IGNORECASE)
_CAPTIONS = ("caption", "captions", "text", "txt", "title", "alt_text", "alt", "description")
_FORMATS = ("parquet", "csv", "tsv", "jsonl", "json")


def url_column(columns: Collection[str]) -> str | None:
    """Return the column whose name says that it has addresses of images; None without one."""
    found = sorted((name for name in columns if _URLS.fullmatch(name)), key=len)
    return found[0] if found else None


def download_advice(
    config: DataConfig, file: str, columns: Collection[str], url: str, *, header: bool = True
) -> str:
    """Return what to do with a table of addresses: the command of img2dataset, and the source.

    Args:
        config: of the data, whose captions are looked for first.
        file: the table, or one of several in a folder.
        columns: names of its columns.
        url: the column with the addresses.
        header: whether the table has the names of its columns.
    """
    texts = {name.lower(): name for name in columns if name != url}
    chosen = [name for name in config.captions if name in columns]
    chosen += [texts[name] for name in _CAPTIONS if name in texts]
    name, zipped = file.removesuffix(".gz"), ".gz" * file.endswith(".gz")
    form = next((f for f in _FORMATS if name.endswith(f".{f}")), "csv") + zipped
    several = os.path.basename(config.source) != os.path.basename(file)
    place = os.path.dirname(file) if several else file
    options = {
        "url_list": place,
        "input_format": form,
        "url_col": url,
        "caption_col": (chosen or ["CAPTION_COLUMN"])[0],
        "output_format": "webdataset",
        "output_folder": "shards",
        "image_size": "384",
        "resize_mode": "keep_ratio",
    }
    command = " ".join(f"--{option} {shlex.quote(value)}" for option, value in options.items())
    first = ""
    if not header:
        names = ("\\t" if name.endswith(".tsv") else ",").join(columns)
        first = (
            f"name the columns in its first line, as by sed -i '1i {names}' {shlex.quote(file)}, "
        )
    last = "and train with --data.source shards/"
    return f"{first}download the images with img2dataset {command}, {last}"
