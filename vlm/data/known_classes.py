"""Class names and prompt templates of public data sets, as used by CLIP_benchmark.

ImageNet's 1,000 names and 80 templates, the classes of ImageNet-A, -R and -O, and the lists of 30
other data sets. They are stored in `class_lists/classes.json`, which is read on first use.
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.errors import DataError

# ImageNet and the data sets that share all of its classes.
_ALL_OF_IMAGENET = ("imagenet1k", "imagenetv2", "imagenet_sketch")
_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


class KnownClasses(NamedTuple):
    """Classes of a data set.

    Attributes:
        names: in the order of ids; empty if CLIP_benchmark uses those of the data set.
        templates: prompts with `{}` for the name.
        wordnet_ids: of each class, for ImageNet and its subsets.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    wordnet_ids: tuple[str, ...] = ()


@functools.cache
def known_classes(name: str) -> KnownClasses | None:
    """Look up the classes of a data set by its name in CLIP_benchmark; None if unknown.

    Example:
        >>> from vlm.data.known_classes import known_classes
        >>> result = known_classes("imagenet-r")
        >>> len(result.names), result.names[0], result.wordnet_ids[0], len(result.templates)
        (200, 'goldfish', 'n01443537', 80)
    """
    lists = _classes()
    short = name.removeprefix("vtab/")
    imagenet = lists["names"]["imagenet1k"]
    templates = tuple(t.replace("{c}", "{}") for t in lists["templates"].get(short, ()))
    chosen = range(len(imagenet)) if name in _ALL_OF_IMAGENET else None
    if (chosen := lists["imagenet_subsets"].get(name, chosen)) is not None:
        return KnownClasses(
            tuple(imagenet[i] for i in chosen),
            tuple(t.replace("{c}", "{}") for t in lists["templates"]["imagenet1k"]),
            tuple(lists["wordnet_ids"][i] for i in chosen),
        )
    key = "caltech101_vtab" if name == "vtab/caltech101" else short
    names = tuple(lists["names"].get(key, ()))
    return KnownClasses(names, templates) if names or templates else None


def classes_of_tfds(name: str, labels: Sequence[str]) -> KnownClasses | None:
    """Look up the classes of the TFDS data set `name` with these labels; None if unknown.

    TFDS lists ImageNet's 1,000 WordNet ids also for ImageNet-A and -R, which use 200 of them.
    """
    known = known_classes(tfds_names().get(name, ""))
    if known is None or not set(known.wordnet_ids) <= set(labels):
        return None
    fits = known.wordnet_ids or len(known.names) in (0, len(labels))
    return known if fits else None


@functools.cache
def tfds_names() -> dict[str, str]:
    """Return CLIP_benchmark's names of TFDS data sets with the same class ids."""
    return _read("tfds.json")


def imagenet_names(labels: Sequence[str]) -> dict[str, str]:
    """Return ImageNet's names of the labels that are WordNet ids of its classes.

    Example:
        >>> from vlm.data.known_classes import imagenet_names
        >>> imagenet_names(["n01443537", "cat"])
        {'n01443537': 'goldfish'}
    """
    if not any(map(_WORDNET_ID.fullmatch, labels)):
        return {}
    return {label: _imagenet()[label] for label in labels if label in _imagenet()}


def imagenet_templates(labels: Sequence[str]) -> tuple[str, ...] | None:
    """Return ImageNet's 80 templates, if all labels are WordNet ids of its classes."""
    known = known_classes("imagenet1k")
    return known.templates if known and labels and set(labels) <= set(_imagenet()) else None


def check_names(names: Sequence[str], where: str) -> None:
    """Raise a DataError if a class name is blank, a number or a WordNet id."""
    for name in names:
        if _WORDNET_ID.fullmatch(name):
            kind = "a WordNet id"
        elif _NUMBER.fullmatch(name.strip()):
            kind = "a number"
        elif not name.strip():
            kind = "blank"
        else:
            continue
        raise DataError(
            f"the class {name!r} of {where} is {kind}, which a text encoder cannot compare with "
            "images: give a file with a name for each class (--class-names FILE; of vlm train: "
            "--data.label label --data.class-names FILE)"
        )


@functools.cache
def _classes() -> dict[str, Any]:
    return _read("classes.json")


@functools.cache
def _imagenet() -> dict[str, str]:
    known = known_classes("imagenet1k")
    return {} if known is None else dict(zip(known.wordnet_ids, known.names, strict=True))


def _read(file: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "class_lists" / file).read_text("utf-8"))
