"""Labelled images: reading, stratified splits, and tables for training."""

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm.data.duplicates import Thumbnails, copy_groups, thumbnails
from vlm.data.splits import VALIDATION_SHARE
from vlm.errors import ConfigError, DataError, VlmError
from vlm.evaluation.suites import open_labelled
from vlm.evaluation.tasks import DataInfo
from vlm.heads.encoder import Encoder
from vlm.heads.inputs import Images
from vlm.heads.prompts import indices
from vlm.heads.zero_shot import encode_images

KINDS = ("tfds:", "folder:", "wds:")
NAMES = "class_names.json"  # beside a written table


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and their classes.

    Attributes:
        images: PIL images, paths, bytes of files or arrays of pixels.
        target: class index of each image.
        names: classes.
        data: origin.
        texts: class names in sentences; by default `names`.
        templates: of the data set, if it has any.

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
        """Return a subset of the images, by index."""
        images = [self.images[i] for i in at]
        taken = replace(self, images=images, target=self.target[at])
        if "thumbnails" in self.__dict__:
            taken.__dict__["thumbnails"] = self.thumbnails[at]
        return taken

    @functools.cached_property
    def thumbnails(self) -> Thumbnails:
        """The images reduced to a few pixels, to find copies."""
        return thumbnails(self.images)

    @functools.cached_property
    def groups(self) -> Int[np.ndarray, " n"]:
        """Group index of each image; copies of an image share one."""
        return copy_groups(self.thumbnails)


def read_labelled(
    source: str,
    split: str | None = None,
    data_dir: str | None = None,
    class_names: str | None = None,
) -> Labelled:
    """Read labelled images from a class folder, or from `tfds:`, `folder:`, `wds:` and a name.

    Args:
        source: folder or name.
        split: by default the one that a task is measured on, see `vlm.evaluation.suites`.
        data_dir: of TFDS data.
        class_names: a file with the names of the labels, see `DataConfig.class_names`.

    Raises:
        DataError: no such data or split; fewer than two classes.

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
    """Renumber the classes as in `names`, and replace their texts if `texts` is given.

    Raises:
        ConfigError: a class that `names` does not have.
    """
    at = indices(labelled.names, names)
    own = dict(zip(labelled.names, labelled.texts, strict=True))
    texts = texts or [own.get(name, name) for name in names]
    return replace(labelled, target=at[labelled.target], names=tuple(names), texts=tuple(texts))


def hold_out(
    labelled: Labelled, fraction: float = VALIDATION_SHARE, seed: int = 0
) -> tuple[Labelled, Labelled]:
    """Split into training and validation images, stratified by class.

    Copies of an image, also re-encoded or resized, stay on one side. Each class keeps at least one
    training image; of two or more that are not copies, at least one is held out.

    Raises:
        DataError: no class has two images.
    """
    rng = np.random.default_rng(seed)
    order, sizes = np.argsort(labelled.groups, kind="stable"), np.bincount(labelled.groups)
    members = np.split(order, np.cumsum(sizes)[:-1])
    left = np.bincount(labelled.target, minlength=len(labelled.names))  # for training
    held = np.zeros(len(labelled), bool)

    def hold(image: int, most: int) -> None:
        """Hold out the group of an image if it has at most `most` and no class becomes empty."""
        group = members[labelled.groups[image]]
        taken = np.bincount(labelled.target[group], minlength=len(left))
        if len(group) <= most and not held[image] and (left[taken > 0] > taken[taken > 0]).all():
            held[group] = True
            np.subtract(left, taken, out=left)

    for number in range(len(labelled.names)):
        own = rng.permutation(np.flatnonzero(labelled.target == number))
        count = min(max(1, round(fraction * len(own))), len(own) - 1) if len(own) else 0
        for image in own.tolist():
            hold(image, count - int(held[own].sum()))
        for image in sorted(own.tolist(), key=lambda i: sizes[labelled.groups[i]]):
            if held[own].any():
                break
            hold(image, len(labelled))  # each group is larger than the fraction
    if not held.any():
        raise DataError(
            f"{labelled.data} has one image of each class, copies of it aside, and none can be "
            "held out for validation: give at least two of a class"
        )
    return labelled.take(np.flatnonzero(~held)), labelled.take(np.flatnonzero(held))


def pick_shots(labelled: Labelled, shots: int, seed: int = 0) -> Int[np.ndarray, " k"]:
    """Pick the indices of random images: `shots` of each class, or all that it has.

    Of copies of an image, also re-encoded or resized, one is picked.

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
    """Write the images as a table for training, with `image` and `label`; return its path.

    Class names are written beside it, for `DataConfig.class_names`. Paths are kept, and pixels are
    written as PNG.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, image in enumerate(labelled.images):
        if isinstance(image, str | os.PathLike):
            path = os.path.abspath(image)
        else:
            path = f"{number:06d}.{'img' if isinstance(image, bytes) else 'png'}"
            if isinstance(image, bytes):
                (folder / path).write_bytes(image)
            else:
                picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
                picture.save(folder / path, "PNG")
        rows.append({"image": path, "label": labelled.names[labelled.target[number]]})
    texts = dict(zip(labelled.names, labelled.texts, strict=True))
    (folder / NAMES).write_text(json.dumps(texts), "utf-8")
    table = folder / "images.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def embed_labelled(
    model: Encoder,
    images: Images,
    labels: Sequence[str],
    classes: Sequence[str] | None,
    batch_size: int | None,
) -> tuple[Float[np.ndarray, "n d"], list[str], Int[np.ndarray, " n"]]:
    """Return embeddings, class names and class indices of labelled images, or of embeddings.

    Raises:
        ConfigError: a label that is no class, or not one label per image.
    """
    if isinstance(images, np.ndarray) and images.ndim == 2:
        z_image = images
    else:
        z_image, _ = encode_images(model, images, batch_size)
    if len(labels) != len(z_image):
        raise ConfigError(f"{len(z_image)} images and {len(labels)} labels: give one label each")
    names = sorted(set(labels)) if classes is None else list(classes)
    return z_image, names, indices(labels, names)
