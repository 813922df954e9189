"""Image folders: with a text file of the same name beside each image, or with class folders.

`photos/a.jpg` with `photos/a.txt` (one caption per line), `photos/a.json` (fields) or both has
captions, as in img2dataset's `files` format; `members` defines the features. `pets/cat/1.jpg` has
the label `cat`; images outside class folders are skipped. Subfolders named as splits, such as
`train` and `val`, are splits; without them the whole folder is the training split. The classes are
those of all splits. Symbolic links are followed. Skipped files are logged.
"""

import collections
import os

from vlm.config import DataConfig
from vlm.data.examples import WHERE, Example, check_features, known_features
from vlm.data.faults import BadSample
from vlm.data.members import reads, texts_of
from vlm.data.splits import NAMES, find_split
from vlm.data.storage import read_file
from vlm.errors import DataError, warn_once
from vlm.inputs.folders import files_under, is_image_name, report_skipped
from vlm.paths import as_path


class FolderSource:
    """Source over image files, with the text files beside them or their class folder."""

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
            raise BadSample.failed_read(image, why, error) from None
        return texts_of(parts, config, image, by_line=True) | own


def open_split(config: DataConfig, split: str) -> FolderSource:
    """Open the images of a folder without a table; DataError if it has no texts or classes."""
    root = top = as_path(config.source)
    known = list_splits(config)
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
    skipped = []
    is_read = reads(config)
    for path in files_under(root):
        stem, ending = os.path.splitext(path)
        if is_image_name(path):
            images.append(path)
        elif ending and not config.label and is_read(ending[1:].lower()):
            beside[stem][ending[1:].lower()] = path
        else:
            skipped.append(path)
    stems = {os.path.splitext(path)[0] for path in images}
    skipped += [p for stem, texts in beside.items() if stem not in stems for p in texts.values()]
    place = os.fspath(root)
    report_skipped(skipped, place, "are neither images nor texts beside one")
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
        for path in sorted(images, key=_order if config.label else None)
    ]
    label_names = None
    if config.label:
        labels = {label for _, _, label in rows}
        for other in (top / name for name in known or () if top / name != root):
            paths = [path for path in files_under(other) if is_image_name(path)]
            labels.update(_class_of(p) for p in paths if os.path.dirname(p) != os.fspath(other))
        label_names = sorted(labels)
    source = FolderSource(rows, config, label_names)
    where = f"the folder {root}"
    check_features(config, known_features(source, config, where), where)
    return source


def has_texts(folder: str) -> bool:
    """Whether some image under a folder has a text file or JSON of the same name beside it."""
    paths = list(files_under(folder))
    stems = {os.path.splitext(path)[0] for path in paths if is_image_name(path)}
    pairs = (os.path.splitext(path) for path in paths)
    return any(ending.lower() in (".txt", ".json") and stem in stems for stem, ending in pairs)


def list_splits(config: DataConfig) -> list[str] | None:
    """List the split folders in a folder; None if no folder is named as a split.

    With class labels, a split must have subfolders: `train` with only images is a class (trains).
    """
    root = as_path(config.source)
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if config.label:
        folders = [path for path in folders if any(inner.is_dir() for inner in path.iterdir())]
    wanted = {*NAMES, config.train_split, config.eval_split}
    names = [path.name for path in folders if path.name.lower() in wanted or path.name in wanted]
    return sorted(names) or None


def _folders_in(root: str) -> set[str]:
    folders = (path for path in as_path(root).iterdir() if path.is_dir())
    return {path.name for path in folders if not path.name.startswith((".", "__"))}


def _order(path: str) -> list[str]:
    """Key that sorts class folders by name, and images in them, as torchvision's ImageFolder."""
    return path.split("/")


def _class_of(path: str) -> str:
    return os.path.basename(os.path.dirname(path))


def _in_class_folders(images: list[str], root: str) -> list[str]:
    """Select the images in class folders of `root`.

    DataError if there are none, or if different depths make the classes ambiguous.
    """
    depths = {path: path[len(root) :].strip("/").count("/") for path in images}
    inside = [path for path, depth in depths.items() if depth]
    if not inside:
        raise DataError(
            f"{root} has images and no class folders: sort them into one folder for each class"
        )
    report_skipped((p for p, depth in depths.items() if not depth), root, "are in no class folder")
    if empty := sorted(_folders_in(root) - {path[len(root) :].split("/")[1] for path in inside}):
        warn_once(f"folders of {root} without images, which are no classes: {', '.join(empty)}")
    shallow, deep = (choose(inside, key=depths.__getitem__) for choose in (min, max))
    if depths[shallow] != depths[deep]:
        raise DataError(
            f"the class folders of {root} lie at different depths ({shallow}, {deep}): make each "
            "image's own folder its class, at one depth"
        )
    return inside
