"""A folder of images: with a text of the same name beside each, or sorted into class folders.

`photos/a.jpg` with `photos/a.txt` (a caption a line), `photos/a.json` (fields) or both has
captions, as img2dataset's `files` format does; `members` says which feature each file is.
`pets/cat/1.jpg` has the label `cat`; images outside the class folders are skipped. A folder with
folders that are called like splits, such as `train` and `val`, has these splits; without, all of it
is the training split. The classes are those of all splits. Symbolic links are followed. What is
skipped is logged.
"""

import collections
import os

from vlm.config import DataConfig
from vlm.data.examples import WHERE, Example, check_features, known_features
from vlm.data.faults import BadSample
from vlm.data.members import reads, texts_of
from vlm.data.splits import NAMES, find_split
from vlm.data.storage import read_file
from vlm.errors import DataError
from vlm.inputs.folders import files_under, is_image_name, report_skipped
from vlm.paths import as_path


class FolderSource:
    """Image files by path, with what lies beside them or their folder's name."""

    def __init__(
        self,
        rows: list[tuple[str, dict[str, str], str]],
        config: DataConfig,
        label_names: list[str] | None = None,
    ):
        self._rows, self._config, self.label_names = rows, config, label_names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        image, beside, label = self._rows[index]
        config = self._config
        own: Example = {WHERE: image, config.image: image}
        if config.label:
            return own | {config.label: label}
        if not beside:
            raise BadSample("no caption", image, f"{image} has no text beside it")
        try:
            parts: dict[str, bytes | None] = {e: read_file(p) for e, p in beside.items()}
        except OSError as error:
            why = f"the text beside {image} cannot be read: {error}"
            raise BadSample("failed read", image, why) from None
        return texts_of(parts, config, image, by_line=True) | own


def open_folder(config: DataConfig, split: str) -> FolderSource:
    """The images of a folder that has no table.

    Raises:
        DataError: no images, no such split, or neither texts nor class folders.
    """
    root = top = as_path(config.source)
    known = folder_splits(config)
    if known is not None:
        root = top / find_split(split, known, f"the folder {top}")
        stray = [path for path in map(os.fspath, top.iterdir()) if is_image_name(path)]
        report_skipped(sorted(stray), os.fspath(top), "are in no folder of a split")
    elif split != config.train_split:
        raise DataError(
            f"{top} has no folders train, test or validation, so there is no split {split!r}: make "
            "a folder for it, or set eval_split=None"
        )
    images: list[str] = []
    beside: dict[str, dict[str, str]] = collections.defaultdict(dict)
    others = []
    is_read = reads(config)
    for path in files_under(root):
        stem, ending = os.path.splitext(path)
        if is_image_name(path):
            images.append(path)
        elif ending and not config.label and is_read(ending[1:].lower()):
            beside[stem][ending[1:].lower()] = path
        else:
            others.append(path)
    stems = {os.path.splitext(path)[0] for path in images}
    others += [p for stem, texts in beside.items() if stem not in stems for p in texts.values()]
    place = os.fspath(root)
    report_skipped(others, place, "are neither images nor texts beside one")
    if not images:
        raise DataError(
            f"{root} has no captions.csv, captions.tsv or captions.jsonl, and no images: write a "
            "table there, or name a folder with images"
        )
    if config.label:
        images = _in_class_folders(images, place)
    elif not any(stem in beside for stem in stems):
        raise DataError(
            f"{root} has images and no texts: put a .txt or .json beside each, write captions.csv, "
            'or set data.label="label" if its folders are classes'
        )
    rows = [
        (path, dict(beside.get(os.path.splitext(path)[0], {})), _class_of(path))
        for path in sorted(images)
    ]
    label_names = None
    if config.label:
        labels = {label for _, _, label in rows}
        for other in (top / name for name in known or () if top / name != root):
            paths = [path for path in files_under(other) if is_image_name(path)]
            labels |= {
                _class_of(path) for path in paths if os.path.dirname(path) != os.fspath(other)
            }
        label_names = sorted(labels)
    source = FolderSource(rows, config, label_names)
    where = f"the folder {root}"
    check_features(config, known_features(source, config, where), where)
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


def _class_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _in_class_folders(images: list[str], root: str) -> list[str]:
    """The images in the class folders of `root`.

    Raises:
        DataError: there are none, or the folders lie at different depths, so that it is not known
            which of them are classes.
    """
    depths = {path: path[len(root) :].strip("/").count("/") for path in images}
    inside = [path for path, depth in depths.items() if depth]
    if not inside:
        raise DataError(
            f"{root} has images and no class folders: sort them into one folder for each class"
        )
    report_skipped((p for p, depth in depths.items() if not depth), root, "are in no class folder")
    shallow, deep = (choose(inside, key=depths.__getitem__) for choose in (min, max))
    if depths[shallow] != depths[deep]:
        raise DataError(
            f"the class folders of {root} lie at different depths ({shallow}, {deep}): make each "
            "image's own folder its class, at one depth"
        )
    return inside
