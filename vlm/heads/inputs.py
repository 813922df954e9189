"""What a head was handed: one image or many, a picture, a text or an embedding."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.errors import ConfigError, DataError
from vlm.inputs.opening import SUFFIXES, is_image

Kind = Literal["image", "text", "embedding"]


def kind(item: Any, where: str) -> Kind:
    """Whether `item` is a picture, a text or an embedding.

    A `str` is a text, always; a `pathlib.Path`, a PIL image, an array of pixels or the bytes of an
    image file is a picture; a one-dimensional array of floats is an embedding.

    Raises:
        ConfigError: a `str` that names a picture on this disk.
        DataError: none of these.
    """
    if isinstance(item, str):
        # Searching for the words of a file name is never what was meant: refuse, do not guess.
        if os.path.splitext(item)[1].lower() in SUFFIXES and os.path.isfile(item):
            raise ConfigError(
                f"{where} got the text {item!r}, which is the path of a picture: "
                "wrap it in pathlib.Path(...) to use the picture"
            )
        return "text"
    if is_image(item):
        return "image"
    if len(getattr(item, "shape", ())) == 1 and _is_float(item.dtype):
        return "embedding"
    raise DataError(
        f"{where} got a {type(item).__name__}: give a text (str), a picture (pathlib.Path, PIL "
        "image or array of pixels) or an embedding (a vector of floats)"
    )


def split(items: Any, where: str) -> tuple[Kind | None, Iterator[Any], bool]:
    """The kind of `items`, an iterator over them, and whether it was a single one, not a list.

    Only the first item is drawn to tell its kind; `batches` checks the others as they pass. The
    kind of an empty list is None.
    """
    shape = getattr(items, "shape", None)
    if shape is not None:
        # (d,) one embedding, (n, d) floats several; (h, w) and (h, w, c) one picture, else many.
        single = len(shape) == (1 if _is_float(items.dtype) and len(shape) < 3 else 3)
        single = single or (len(shape) == 2 and not _is_float(items.dtype))
    else:
        single = is_image(items)
    if single or not isinstance(items, Iterable):  # `kind` refuses what is nothing that we know
        return kind(items, where), iter([items]), True
    items = iter(items)
    first = list(itertools.islice(items, 1))
    return kind(first[0], where) if first else None, itertools.chain(first, items), False


def default_id(item: Any, number: int) -> str | int:
    """The path of a picture on disk, or else the running number."""
    return str(Path(item)) if isinstance(item, os.PathLike) else number


def _is_float(dtype: Any) -> bool:
    """Of NumPy's floats and JAX's (bfloat16 is no subtype of `np.floating`)."""
    return np.issubdtype(dtype, np.floating) or str(dtype) == "bfloat16"
