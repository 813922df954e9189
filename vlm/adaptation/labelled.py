"""Labelled images to adapt to: read from wherever they lie, split evenly, written for training."""

import functools
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from vlm.data.duplicates import Thumbnails, copy_groups, thumbnails
from vlm.errors import ConfigError, DataError, VlmError
from vlm.evaluation.suites import open_labelled
from vlm.evaluation.tasks import DataInfo
from vlm.heads.prompts import indices

KINDS = ("tfds:", "folder:", "wds:")
NAMES = "class_names.json"  # of a table that is written
SHARE = 0.2  # of each class that is held out to choose by


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and their classes.

    Attributes:
        images: PIL images, paths, bytes of files or arrays of pixels.
        target: for each the number of its class.
        names: the classes.
        data: where they come from.
        texts: what sentences call the classes; by default the classes themselves.
        templates: of the data set, where it brings some.

    Example:
        >>> names = ("red", "green", "blue")
        >>> info = vlm.DataInfo("colours")
        >>> labelled = vlm.adaptation.Labelled(pictures, np.arange(3), names, info)
        >>> len(labelled)
        3
    """

    images: Sequence[Any]
    target: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    data: DataInfo
    texts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "texts", self.texts or self.names)

    def __len__(self) -> int:
        return len(self.target)

    def take(self, at: Int[np.ndarray, " k"]) -> "Labelled":
        """Some of the images, by number."""
        images = [self.images[i] for i in at]
        taken = replace(self, images=images, target=self.target[at])
        if "thumbnails" in self.__dict__:
            taken.__dict__["thumbnails"] = self.thumbnails[at]
        return taken

    @functools.cached_property
    def thumbnails(self) -> Thumbnails:
        """The images in a few pixels each, by which copies are found."""
        return thumbnails(self.images)

    @functools.cached_property
    def groups(self) -> Int[np.ndarray, " n"]:
        """For each image the number of its group: copies of one image share it."""
        return copy_groups(self.thumbnails)


def read_labelled(
    source: str,
    split: str | None = None,
    data_dir: str | None = None,
    class_names: str | None = None,
) -> Labelled:
    """The labelled images of a place: a class folder, or `tfds:`, `folder:`, `wds:` and a name.

    Without a split, the one that a task would be measured on: see `vlm.evaluation.suites`.
    `class_names` is a file with the names of the labels: see `DataConfig.class_names`.

    Raises:
        DataError: nothing there, or no such split; fewer than two classes.

    Example:
        >>> for name, picture in zip(("red", "green"), pictures):
        ...     (folder / "colours" / name).mkdir(parents=True)
        ...     picture.save(folder / "colours" / name / "1.png")
        >>> vlm.adaptation.read_labelled(str(folder / "colours")).names
        ('green', 'red')
    """
    name = source if source.startswith(KINDS) else f"folder:{source}"
    try:
        opened = open_labelled(name, data_dir, split, class_names)
    except VlmError as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    labels, texts = map(tuple, opened.classes)
    if len(labels) < 2:
        raise DataError(
            f"{source} has the one class {', '.join(map(repr, labels))}: give images of at least "
            "two"
        )
    images = [opened.image(i) for i in range(len(opened.target))]
    templates = tuple(getattr(opened.source, "templates", None) or ())
    target = np.asarray(opened.target, np.int64)
    return Labelled(images, target, labels, opened.data, texts, templates)


def with_names(labelled: Labelled, names: Sequence[str], texts: Sequence[str] = ()) -> Labelled:
    """The same images, their classes counted as in `names`, and called `texts` or as they were.

    Raises:
        ConfigError: a class that is none of them.
    """
    at = indices(labelled.names, names)
    own = dict(zip(labelled.names, labelled.texts, strict=True))
    texts = texts or [own.get(name, name) for name in names]
    return replace(labelled, target=at[labelled.target], names=tuple(names), texts=tuple(texts))


def hold_out(labelled: Labelled, share: float = SHARE, seed: int = 0) -> tuple[Labelled, Labelled]:
    """The images to learn from, and those to choose by: an even share of each class.

    Copies of one image, also re-encoded or resized, stay on one side. A class keeps at least one
    image to learn from; of two or more that are no copies, at least one is held out.

    Raises:
        DataError: no class has two images.
    """
    rng = np.random.default_rng(seed)
    order, sizes = np.argsort(labelled.groups, kind="stable"), np.bincount(labelled.groups)
    members = np.split(order, np.cumsum(sizes)[:-1])
    left = np.bincount(labelled.target, minlength=len(labelled.names))  # to learn from
    held = np.zeros(len(labelled), bool)

    def hold(image: int, most: int) -> None:
        """Hold out the group of an image, if it is no more than `most` and no class ends empty."""
        group = members[labelled.groups[image]]
        taken = np.bincount(labelled.target[group], minlength=len(left))
        if len(group) <= most and not held[image] and (left[taken > 0] > taken[taken > 0]).all():
            held[group] = True
            np.subtract(left, taken, out=left)

    for number in range(len(labelled.names)):
        own = rng.permutation(np.flatnonzero(labelled.target == number))
        count = min(max(1, round(share * len(own))), len(own) - 1) if len(own) else 0
        for image in own.tolist():
            hold(image, count - int(held[own].sum()))
        for image in sorted(own.tolist(), key=lambda i: sizes[labelled.groups[i]]):
            if held[own].any():
                break
            hold(image, len(labelled))  # each group is larger than the share
    if not held.any():
        raise DataError(
            f"{labelled.data} has one image of each class, copies of it aside, and none can be "
            "held out to choose a method by: give at least two of a class"
        )
    return labelled.take(np.flatnonzero(~held)), labelled.take(np.flatnonzero(held))


def pick_shots(labelled: Labelled, shots: int, seed: int = 0) -> Int[np.ndarray, " k"]:
    """The numbers of so many images of each class at random, or of all that it has.

    Of copies of one image, also re-encoded or resized, one is picked.

    Raises:
        ConfigError: no shots.
    """
    if shots < 1:
        raise ConfigError(f"shots is {shots}: learn from at least one image of a class")
    rng = np.random.default_rng(seed)
    picked = []
    for number in range(len(labelled.names)):
        own = rng.permutation(np.flatnonzero(labelled.target == number))
        first = np.sort(np.unique(labelled.groups[own], return_index=True)[1])
        picked.append(own[first][:shots])
    return np.sort(np.concatenate(picked))


def write_table(labelled: Labelled, folder: str | os.PathLike) -> Path:
    """Write the images as a table that training reads: `image` and `label`; returns its path.

    Beside it are the names of the classes, for `DataConfig.class_names`. Files stay where they are.
    Pixels are written as PNG.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, image in enumerate(labelled.images):
        if isinstance(image, str | os.PathLike):
            path = os.path.abspath(image)
        else:
            path = f"{number:06d}.{'img' if isinstance(image, bytes) else 'png'}"
            (folder / path).write_bytes(image if isinstance(image, bytes) else _png(image))
        rows.append({"image": path, "label": labelled.names[labelled.target[number]]})
    texts = dict(zip(labelled.names, labelled.texts, strict=True))
    (folder / NAMES).write_text(json.dumps(texts), "utf-8")
    table = folder / "images.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def _png(image: Any) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
