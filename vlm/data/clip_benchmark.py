"""Data sets in the layout of CLIP_benchmark: a folder with shards, class names and templates.

    FOLDER/classnames.txt                          one class name per line, in the order of labels
    FOLDER/zeroshot_classification_templates.txt   one template per line, {c} for the name
    FOLDER/dataset_type.txt                        classification (without the file), multilabel
                                                   or retrieval
    FOLDER/test/nshards.txt, 0.tar, 1.tar, ...     an image and a label (cls), labels (npy) or
                                                   captions (txt, one a line) each

`clip_benchmark_export_wds` writes it, and 60 data sets are on the Hub in it (clip-benchmark/wds_*).
FOLDER is on this machine, or an address of a bucket, a web server or the Hub's web pages.
"""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from vlm.config import DataConfig
from vlm.data import tar
from vlm.data.class_names import numbered
from vlm.data.examples import WHERE, Example, check_features
from vlm.data.faults import BadSample
from vlm.data.members import image_of
from vlm.data.shard_index import ShardSource, index_for
from vlm.data.splits import NAMES, find_split
from vlm.data.storage import exists, read_file
from vlm.errors import DataError
from vlm.paths import as_path, decode_text, is_remote

PREFIX = "wds:"
IMAGES = ("webp", "png", "jpg", "jpeg")  # the first that a sample has is used, as in CLIP_benchmark
MEMBERS = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_HUB = "https://huggingface.co/datasets/"
_TEMPLATES = "zeroshot_classification_templates.txt"


def is_clip_benchmark(source: str) -> bool:
    """Whether `source` is a folder in this layout: it starts with `wds:`, or has the files."""
    if source.startswith(PREFIX):
        return ".tar" not in source
    return not is_remote(source) and bool(_splits(source))


def list_splits(config: DataConfig) -> list[str]:
    """List the splits, the subfolders with a file `nshards.txt`; DataError if there is none."""
    if splits := _splits(config.source):
        return splits
    raise DataError(
        f"{config.source} has no test/nshards.txt, as CLIP_benchmark has it: check the folder"
    )


def _splits(source: str) -> list[str]:
    root = _root(source)
    if is_remote(root):
        return [name for name in NAMES if exists(f"{_texts(root)}/{name}/nshards.txt")]
    return sorted(path.parent.name for path in as_path(root).glob("*/nshards.txt"))


def dataset_type(source: str) -> str:
    """Read the type of a data set: a key of `MEMBERS`, or a DataError."""
    lines = _lines(_root(source), "dataset_type.txt") or ["classification"]
    kind = lines[0].strip().lower()
    if kind not in MEMBERS:
        raise DataError(
            f"dataset_type.txt of {source} is {kind!r}: write one of {', '.join(MEMBERS)}"
        )
    return kind


def open_split(config: DataConfig, split: str) -> "ClipBenchmarkSource":
    """Open the examples of a split; DataError if it or a wanted feature is missing."""
    root, source = _root(config.source), config.source
    split = find_split(split, list_splits(config), source)
    text = read_file(f"{_texts(root)}/{split}/nshards.txt").decode().strip()
    if not text.isdecimal() or not int(text):
        raise DataError(f"nshards.txt of {source}/{split} is {text!r}: write the number of shards")
    shards = [f"{_shards(root)}/{split}/{i}.tar" for i in range(int(text))]
    return ClipBenchmarkSource(shards, config)


class ClipBenchmarkSource(ShardSource):
    """Source over a split of a folder in this layout.

    A label is the name of its class (with the class number, if several classes share the name), or
    only the number if the folder has no class names. Multilabel data has a list of labels.
    """

    def __init__(self, names: list[str], config: DataConfig):
        root = _root(config.source)
        self.dataset_type = dataset_type(config.source)
        self._member = MEMBERS[self.dataset_type]
        own = ["caption", "txt"] if self.dataset_type == "retrieval" else ["label", self._member]
        check_features(config, [config.image, *own], f"{self.dataset_type} data {config.source}")
        self.label_names = self.class_names = self.templates = None
        if self.dataset_type != "retrieval":
            self.class_names = _lines(root, "classnames.txt")
            self.label_names = self.class_names and numbered(self.class_names)
            templates = _lines(root, _TEMPLATES)
            self.templates = templates and tuple(t.replace("{c}", "{}") for t in templates)
        read = DataConfig(source=config.source, image=config.image, captions=(self._member,))
        super().__init__(index_for(names), names, read)
        self._features = [config.label] if config.label else list(config.captions)
        if self.faults:  # a metric must not be computed on a part of the data
            fault = BadSample(**self.faults[0])
            raise DataError(f"{fault}: fetch it again") from fault

    def _example(self, group: tar.Group, shard: str, more: dict[str, Any] | None) -> Example:
        where = f"{shard}: {group.key}"
        data = group.parts.get(self._member)
        if data is None:
            raise DataError(
                f"{where} has no {self._member}, which {self.dataset_type} data has: write the "
                "shard again"
            )
        found = next((e for e in IMAGES if group.parts.get(e)), None)
        try:  # else the only image, in a format that CLIP_benchmark does not read
            image = group.parts[found or image_of(group.parts, self._config, where)]
        except BadSample as fault:
            raise DataError(f"{fault}: write the shard again") from None
        example = {WHERE: where, self._config.image: image}
        try:
            value = self._value(data, where)
        except ValueError as error:
            raise DataError(f"the {self._member} of {where} cannot be read: {error}") from None
        return example | dict.fromkeys(self._features, value)

    def _value(self, data: bytes, where: str) -> Any:
        if self.dataset_type == "retrieval":
            return data.decode().splitlines()
        count = None if self.class_names is None else len(self.class_names)
        if self.dataset_type == "multilabel":
            labels = np.load(io.BytesIO(data), allow_pickle=False)
            if labels.ndim != 1 or count not in (None, len(labels)):
                raise DataError(
                    f"the labels of {where} have shape {labels.shape} for {count} class names: "
                    "write a zero or one for each"
                )
            names = self.label_names or [str(i) for i in range(len(labels))]
            return [name for name, shown in zip(names, labels, strict=True) if shown]
        number = int(data)
        if number < 0 or (count is not None and number >= count):
            known = "a class" if count is None else f"one of the {count} classes of classnames.txt"
            raise DataError(f"the label {number} of {where} is not {known}: correct it")
        return str(number) if self.label_names is None else self.label_names[number]


def write_texts(
    folder: epath.Path, class_names: Sequence[str] | None, templates: Sequence[str]
) -> None:
    """Write the text files of a folder: of classes with their templates, or of retrieval data."""
    kind = "retrieval" if class_names is None else "classification"
    texts = {"dataset_type.txt": [kind]}
    if class_names is not None:
        texts["classnames.txt"] = [*class_names]
        texts[_TEMPLATES] = [template.replace("{}", "{c}") for template in templates]
    for name, lines in texts.items():
        if lines:
            (folder / name).write_text("".join(f"{line}\n" for line in lines))


def _lines(root: str, name: str) -> list[str] | None:
    """Read the stripped lines of a text file in the folder; None if it is missing."""
    path = f"{_texts(root)}/{name}"
    if not exists(path):
        return None
    return [line.strip() for line in decode_text(read_file(path), path).splitlines()]


def _root(source: str) -> str:
    root = source.removeprefix(PREFIX).rstrip("/")
    return root if is_remote(root) else os.path.expanduser(root)


def _texts(root: str) -> str:
    """Return the address of text files, which on the Hub differs from that of shards."""
    return root.replace("/tree/", "/raw/", 1) if root.startswith(_HUB) else root


def _shards(root: str) -> str:
    return root.replace("/tree/", "/resolve/", 1) if root.startswith(_HUB) else root
