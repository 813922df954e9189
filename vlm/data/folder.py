"""A folder of images: with a text of the same name beside each, or sorted into class folders.

`photos/a.jpg` with `photos/a.txt` (a caption a line) or `photos/a.json` (fields) has captions;
`pets/cat/1.jpg` has the label `cat`. A folder with folders that are called like splits, such as
`train` and `val`, has these splits; without, all of it is the training split. The classes are those
of all splits.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from vlm.config import DataConfig
from vlm.data.examples import WHERE, Example, check_features
from vlm.data.faults import BadSample
from vlm.data.splits import NAMES, find_split
from vlm.data.storage import read_file
from vlm.data.webdataset import IMAGES
from vlm.errors import DataError
from vlm.paths import as_path

_TEXTS = (".txt", ".json")


class FolderSource:
    """Image files by path, with what lies beside them or their folder's name."""

    def __init__(
        self,
        rows: list[tuple[str, str | None, str]],
        config: DataConfig,
        label_names: list[str] | None = None,
    ):
        self._rows, self._config, self.label_names = rows, config, label_names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        image, text, label = self._rows[index]
        config = self._config
        example: Example = {WHERE: image, config.image: image}
        if config.label:
            example[config.label] = label
            return example
        if text is None:
            raise BadSample("no caption", image, f"{image} has no text beside it")
        return self._read(text) | example

    def _read(self, text: str) -> Example:
        try:
            said = read_file(text).decode("utf-8-sig")
            if not text.endswith(".json"):
                lines = [line.strip() for line in said.splitlines() if line.strip()]
                return {self._config.captions[0]: lines}
            fields = json.loads(said)
            if not isinstance(fields, dict):
                raise ValueError("it is not an object with named fields")
            return fields
        except ValueError as error:
            raise BadSample("broken text", text, f"{text} cannot be read: {error}") from None
        except OSError as error:
            raise BadSample("failed read", text, f"{text} cannot be read: {error}") from None


def open_folder(config: DataConfig, split: str) -> FolderSource:
    """The images of a folder that has no table.

    Raises:
        DataError: no images, no such split, or neither texts nor class folders.
    """
    root = top = as_path(config.source)
    known = folder_splits(config)
    if known is not None:
        root = top / find_split(split, known, f"the folder {top}")
    elif split != config.train_split:
        raise DataError(
            f"{top} has no folders train, test or validation, so there is no split {split!r}: make "
            "a folder for it, or set eval_split=None"
        )
    images, texts = {}, {}
    for path in _walk(root):
        stem, ending = os.path.splitext(path)
        if _is_image(path):
            images[path] = stem
        elif ending in _TEXTS:
            texts.setdefault(stem, path)
    if not images:
        raise DataError(
            f"{root} has no captions.csv, captions.tsv or captions.jsonl, and no images: write a "
            "table there, or name a folder with images"
        )
    rows = [
        (path, texts.get(stem), os.path.basename(os.path.dirname(path)))
        for path, stem in sorted(images.items())
    ]
    if not config.label and not texts:
        raise DataError(
            f"{root} has images and no texts: put a .txt or .json beside each, write captions.csv, "
            'or set data.label="label" if its folders are classes'
        )
    label_names = None
    if config.label:
        folders = {os.path.dirname(path) for path, _, _ in rows}
        for other in (top / name for name in known or () if top / name != root):
            folders |= {os.path.dirname(path) for path in _walk(other) if _is_image(path)}
        label_names = sorted({os.path.basename(folder) for folder in folders})
    source = FolderSource(rows, config, label_names)
    first = next(i for i, row in enumerate(rows) if config.label or row[1])
    check_features(config, list(_quietly(source, first, config)), f"the folder {root}")
    return source


def folder_splits(config: DataConfig) -> list[str] | None:
    """The folders of splits in a folder; None where none is called like a split.

    Of classes, a split has folders inside: `train` with nothing but images is the class of trains.
    """
    root = as_path(config.source)
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if config.label:
        folders = [path for path in folders if any(inner.is_dir() for inner in path.iterdir())]
    wanted = {*NAMES, config.train_split, config.eval_split}
    found = [path.name for path in folders if path.name.lower() in wanted or path.name in wanted]
    return sorted(found) or None


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower().removeprefix(".") in IMAGES


def _quietly(source: FolderSource, index: int, config: DataConfig) -> dict[str, Any]:
    try:
        return {name: value for name, value in source[index].items() if name != WHERE}
    except BadSample:  # met again, and counted, in training
        return dict.fromkeys([config.image, *config.captions])


def _walk(folder: epath.Path) -> Iterator[str]:
    for parent, folders, names in folder.walk():
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.fspath(parent / name) for name in names if not name.startswith("."))
