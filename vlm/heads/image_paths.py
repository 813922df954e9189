"""Ids that are paths of images: the default id of a file, and ids of files that have moved."""

import os
import re
from collections.abc import Mapping
from typing import Any

from vlm.inputs.opening import SUFFIXES
from vlm.paths import is_remote

_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")  # of any system: an index may come from another one
RELATIVE = "."  # stands for the folder of all relative paths


def absolute(path: str | os.PathLike) -> str:
    """Return the absolute path of a file; `gs://` and `s3://` paths are absolute already."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def is_image_path(id: object) -> bool:
    """Whether an id is the path of an image, by its suffix."""
    return isinstance(id, str) and os.path.splitext(id)[1].lower() in SUFFIXES


def is_relative(id: object) -> bool:
    """Whether an id is a path of an image that depends on the working directory."""
    return isinstance(id, str) and is_image_path(id) and not (_ABSOLUTE.match(id) or is_remote(id))


def relocated(ids: list, folders: Mapping[str, str]) -> tuple[list, set[str]]:
    """Return the ids after images moved to other folders, and the old folders with no image.

    Args:
        folders: old and new folders; "." is the folder of relative paths. The longest one counts.
    """
    by_length, unused = sorted(folders, key=len, reverse=True), set(folders)

    def moved(id: Any) -> Any:
        for old in by_length if isinstance(id, str) else ():
            rest = _inside(id, old)
            if rest:
                unused.discard(old)
                return os.path.join(absolute(folders[old]), rest)
        return id

    return [moved(id) for id in ids], unused


def _inside(id: str, old: str) -> str:
    """Return the path of an id relative to a folder; empty if it does not lie in the folder."""
    if old == RELATIVE:
        return id if is_relative(id) else ""
    old = old.rstrip("/\\")
    if not id.startswith(old) or id[len(old) : len(old) + 1] not in ("/", "\\"):
        return ""
    rest = id[len(old) + 1 :]
    return rest.replace("\\", "/") if "\\" in id[: len(old) + 1] else rest
