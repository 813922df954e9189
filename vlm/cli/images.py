"""The IMAGES of a command: files, folders and globs as one list of pictures, and the bad ones."""

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from vlm.errors import DataError
from vlm.inputs.opening import SUFFIXES, OnError
from vlm.paths import as_path


def find_images(places: Sequence[str]) -> list[epath.Path]:
    """Every picture that `places` name, in order, each once.

    A file is taken whatever it is called. A folder, local or remote, is searched whole for files
    that look like pictures, sorted by path, hidden ones left out. A pattern (`*`, `?`, `[...]`,
    `**`) stands for the files and folders that it matches.

    Raises:
        DataError: a place that does not exist, or that holds no pictures.
    """
    found: dict[str, epath.Path] = {}
    for place in places:
        for path in _pictures(place):
            found.setdefault(os.fspath(path), path)
    return list(found.values())


class Unreadable:
    """The pictures of a command that cannot be read: each is named at once, counted at the end.

    Args:
        total: how many pictures the command has; if that is one, its error is the command's.
    """

    def __init__(self, total: int):
        self._total = total
        self._bad: set[str] = set()

    def among(self, paths: Sequence[epath.Path]) -> OnError:
        """The `on_error` of an encoder that is given `paths`."""

        def on_error(position: int, error: DataError) -> None:
            if self._total == 1:
                raise error
            self._bad.add(os.fspath(paths[position]))
            print(f"vlm: {error}", file=sys.stderr, flush=True)

        return on_error

    def others(self, paths: Sequence[epath.Path]) -> list[epath.Path]:
        """Those of `paths` that could be read."""
        return [path for path in paths if os.fspath(path) not in self._bad]

    def found_before(self, names: set[str]) -> None:
        """Count pictures that an earlier run of the command could not read."""
        for name in sorted(names):
            print(f"vlm: {name} could not be read earlier", file=sys.stderr, flush=True)
        self._bad |= names

    def finish(self) -> None:
        """Let the command fail if any could not be read.

        Raises:
            DataError: how many.
        """
        if self._bad:
            raise DataError(
                f"{len(self._bad):,} of {self._total:,} images could not be read and were left "
                "out: replace or remove those named above"
            )


def _pictures(place: str) -> Iterable[epath.Path]:
    path = as_path(place)
    if path.is_dir():
        inside = sorted(_walk(path), key=os.fspath)
        if not inside:
            raise DataError(
                f"the folder {place!r} holds no images: they are files that end in "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        return inside
    if path.exists():
        return [path]
    matches = sorted(glob.glob(os.fspath(path), recursive=True))
    if not matches:
        wild = glob.has_magic(place)
        raise DataError(
            f"nothing matches {place!r}: check the pattern"
            if wild
            else f"there is no image {place!r}: check the path"
        )
    pictures = [p for match in matches for p in _matched(as_path(match))]
    if not pictures:
        raise DataError(f"no image matches {place!r}: check the pattern")
    return pictures


def _matched(path: epath.Path) -> Iterable[epath.Path]:
    if path.is_dir():
        return sorted(_walk(path), key=os.fspath)
    return [path] if _looks_like_a_picture(path.name) else []


def _walk(folder: epath.Path) -> Iterable[epath.Path]:
    for parent, folders, names in folder.walk():
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (parent / name for name in names if _looks_like_a_picture(name))


def _looks_like_a_picture(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
