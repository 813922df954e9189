"""Labelled images to adapt to: read from wherever they lie, split evenly, written for training."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from vlm.errors import ConfigError, DataError
from vlm.evaluate.suites import Missing, open_task
from vlm.evaluate.tasks import DataInfo, ZeroShotTask
from vlm.heads.prompts import indices

KINDS = ("tfds:", "folder:", "wds:")
SHARE = 0.2  # of each class that is held out to choose by


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images and their classes.

    Attributes:
        images: PIL images, paths, bytes of files or arrays of pixels.
        target: for each the number of its class.
        names: the classes.
        data: where they come from.

    Example:
        >>> names = ("red", "green", "blue")
        >>> labelled = vlm.adapt.Labelled(pictures, np.arange(3), names, vlm.DataInfo("colours"))
        >>> len(labelled)
        3
    """

    images: Sequence[Any]
    target: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    data: DataInfo

    def __len__(self) -> int:
        return len(self.target)

    def take(self, at: Int[np.ndarray, " k"]) -> "Labelled":
        """Some of the images, by number."""
        return Labelled([self.images[i] for i in at], self.target[at], self.names, self.data)


def read_labelled(source: str, split: str | None = None, data_dir: str | None = None) -> Labelled:
    """The labelled images of a place: a class folder, or `tfds:`, `folder:`, `wds:` and a name.

    Without a split, the one that a task would be measured on: see `vlm.evaluate.suites`.

    Raises:
        DataError: nothing there, or no such split; fewer than two classes.

    Example:
        >>> for name, picture in zip(("red", "green"), pictures):
        ...     (folder / "colours" / name).mkdir(parents=True)
        ...     picture.save(folder / "colours" / name / "1.png")
        >>> vlm.adapt.read_labelled(str(folder / "colours")).names
        ('green', 'red')
    """
    name = source if source.startswith(KINDS) else f"folder:{source}"
    task = open_task(name, data_dir, split)
    if isinstance(task, Missing):
        raise DataError(f"{source} cannot be read: {task.why}")
    assert isinstance(task, ZeroShotTask)
    names = tuple(task.captions)
    if len(names) < 2:
        raise DataError(
            f"{source} has the one class {', '.join(map(repr, names))}: give images of at least two"
        )
    return Labelled(list(task.images), np.asarray(task.target, np.int64), names, task.data)


def with_names(labelled: Labelled, names: Sequence[str]) -> Labelled:
    """The same images, their classes counted as in `names`.

    Raises:
        ConfigError: a class that is none of them.
    """
    at = indices(labelled.names, names)
    return Labelled(labelled.images, at[labelled.target], tuple(names), labelled.data)


def hold_out(labelled: Labelled, share: float = SHARE, seed: int = 0) -> tuple[Labelled, Labelled]:
    """The images to learn from, and those to choose by: an even share of each class.

    A class keeps at least one image to learn from; of two or more, at least one is held out.

    Raises:
        DataError: no class has two images.
    """
    rng = np.random.default_rng(seed)
    kept, held = [], []
    for number in range(len(labelled.names)):
        own = rng.permutation(np.flatnonzero(labelled.target == number))
        count = min(max(1, round(share * len(own))), len(own) - 1) if len(own) else 0
        held += own[:count].tolist()
        kept += own[count:].tolist()
    if not held:
        raise DataError(
            f"{labelled.data} has one image of each class, and none can be held out to choose a "
            "method by: give at least two of a class"
        )
    return labelled.take(np.sort(kept)), labelled.take(np.sort(held))


def pick_shots(labelled: Labelled, shots: int, seed: int = 0) -> Int[np.ndarray, " k"]:
    """The numbers of so many images of each class at random, or of all that it has.

    Raises:
        ConfigError: no shots.
    """
    if shots < 1:
        raise ConfigError(f"shots is {shots}: learn from at least one image of a class")
    rng = np.random.default_rng(seed)
    groups = (np.flatnonzero(labelled.target == c) for c in range(len(labelled.names)))
    return np.sort(np.concatenate([rng.permutation(group)[:shots] for group in groups]))


def write_table(labelled: Labelled, folder: str | os.PathLike) -> Path:
    """Write the images as a table that training reads: `image` and `label`; returns its path.

    Files stay where they are. Pixels are written as PNG.
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
    table = folder / "images.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def _png(image: Any) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
