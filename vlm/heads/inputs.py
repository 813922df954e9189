"""Input handling of heads: detect images, texts and embeddings, single or many; assign ids."""

import itertools
import os
from collections.abc import Container, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Array

from vlm.errors import ConfigError, DataError
from vlm.heads.image_paths import absolute
from vlm.heads.items import Id
from vlm.inputs.opening import SUFFIXES, ImageLike, is_image
from vlm.inputs.videos import VIDEO_SUFFIXES

Kind = Literal["image", "text", "embedding"]
Images = ImageLike | Iterable[ImageLike]
Item = ImageLike | Array  # a str is a text, a vector of floats an embedding
Inputs = Item | Iterable[Item]


def kind(item: Any, where: str) -> Kind:
    """Return whether `item` is an image, a text or an embedding.

    A `str` is always treated as text. A `pathlib.Path`, a PIL image, an array of pixels or the
    bytes of an image file is an image. A one-dimensional array of floats is an embedding.

    Raises:
        ConfigError: a `str` that names a picture or video on this disk.
        DataError: an item of another type.
    """
    if isinstance(item, str):
        # The user probably means the image, not the words of its file name: refuse to guess.
        suffix = os.path.splitext(item)[1].lower()
        if suffix in SUFFIXES | VIDEO_SUFFIXES and os.path.isfile(item):
            noun = "picture" if suffix in SUFFIXES else "video"
            raise ConfigError(
                f"{where} got the text {item!r}, which is the path of a {noun}: "
                f"wrap it in pathlib.Path(...) to use the {noun}"
            )
        return "text"
    if is_image(item):
        return "image"
    if len(getattr(item, "shape", ())) == 1 and is_float(item.dtype):
        return "embedding"
    raise DataError(
        f"{where} got a {type(item).__name__}: give a text (str), a picture (pathlib.Path, PIL "
        "image or array of pixels) or an embedding (a vector of floats)"
    )


def split(items: Any, where: str) -> tuple[Kind | None, Iterator[Any], bool]:
    """Return the kind of `items`, an iterator over them, and whether it was a single item.

    Only the first item is consumed to detect its kind; `named_items` checks the following ones. The
    kind of an empty list is None.
    """
    shape = getattr(items, "shape", None)
    if shape is not None:
        # (d,) one embedding, (n, d) floats several; (h, w) and (h, w, c) one image, else several.
        single = len(shape) == (1 if is_float(items.dtype) and len(shape) < 3 else 3)
        single = single or (len(shape) == 2 and not is_float(items.dtype))
    else:
        single = is_image(items)
    if single or not isinstance(items, Iterable):  # `kind` refuses unknown types
        return kind(items, where), iter([items]), True
    items = iter(items)
    first = list(itertools.islice(items, 1))
    return kind(first[0], where) if first else None, itertools.chain(first, items), False


def named_items(
    stream: Iterator[Any],
    what: Kind | None,
    ids: Iterator[Any] | None,
    new_ids: list[Id],
    known: Container[Id],
    first: int,
    replace: bool,
) -> Iterator[Any]:
    """Yield the items, checking their kind, and append their ids to `new_ids`.

    Args:
        stream: the items, all of the kind `what`.
        ids: one for each item; None for paths or running numbers from `first`.
        known: ids that are in the index already.
        replace: whether an item may have a known id.

    Raises:
        ConfigError: another kind, an id twice or of another type, or another number of ids.
    """
    new: set[Id] = set()
    for number, item in enumerate(stream):
        if (item_kind := kind(item, "add")) != what:
            raise ConfigError(
                f"add got {what}s and, as item {number}, {item_kind}: add them in separate calls"
            )
        if ids is None:
            name = default_id(item, first + number, known)
        else:
            name = next(ids, None)
            if name is None:
                raise ConfigError(f"there are only {number} ids: give one for every item")
        name = int(name) if isinstance(name, np.integer) else name
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ConfigError(f"id {name!r} of item {number} is neither a text nor an integer")
        if name in new or (name in known and not replace):
            fix = "leave the item out" if replace else "leave the item out, or call `update`"
            raise ConfigError(
                f"id {name!r} is in the index already: ids are unique, "
                f"so give `ids` of your own, {fix}"
            )
        new.add(name)
        new_ids.append(name)
        yield item
    if ids is not None and next(ids, None) is not None:
        raise ConfigError(f"there are more ids than the {len(new_ids)} items: give one each")


def default_id(item: object, number: int, known: Container[Id] = ()) -> str | int:
    """Return the absolute path of an image on disk, else the running number.

    A relative path stays as it is if it is among the `known` ids, as in indexes of older versions.
    """
    if not isinstance(item, os.PathLike):
        return number
    return os.fspath(item) if os.fspath(item) in known else absolute(item)


def is_float(dtype: Any) -> bool:
    """Whether a dtype is a float of NumPy or JAX (bfloat16 is not a subtype of `np.floating`)."""
    return np.issubdtype(dtype, np.floating) or str(dtype) == "bfloat16"


def check_count(model: str, embeddings: int, items: int) -> None:
    """Raise a DataError unless a model made an embedding of each item."""
    if embeddings != items:
        raise DataError(
            f"{model} made {embeddings} embeddings of {items} items: an encoder of videos "
            "takes the paths of video files, and one of images takes images"
        )
