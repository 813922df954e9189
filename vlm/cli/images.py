"""The IMAGES of a command: files, folders and globs as one list of pictures, and the bad ones."""

import glob
import os
import sys
from collections.abc import Iterable, Sequence

from etils import epath

from vlm.errors import DataError
from vlm.inputs.folders import files_under, is_image_name, report_skipped
from vlm.inputs.opening import SUFFIXES, OnError
from vlm.paths import as_path, is_remote


def find_images(places: Sequence[str]) -> list[epath.Path]:
    """Every picture that `places` name, in order, each once.

    A file is taken whatever it is called. A folder, local or remote, is searched whole for files
    that end like images, sorted by path, hidden ones left out. A pattern (`*`, `?`, `[...]`,
    `**`) stands for the files and folders that it matches. Files that are skipped for their type
    are counted and named in one message for each place.

    Raises:
        DataError: a place that does not exist, or that holds no images.
    """
    found = dict.fromkeys(path for place in places for path in _images(place))
    return [as_path(path) for path in found]


def state_of(path: epath.PathLike) -> tuple[int, int | None]:
    """Bytes and time of writing (nanoseconds) of a file, by which a change of it is seen.

    One that is not there, such as where a link is broken, has (-1, None), and is looked at again.
    """
    try:
        if is_remote(path):
            found = as_path(path).stat()
            return found.length, found.mtime
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except OSError:
        return -1, None


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


def _images(place: str) -> list[str]:
    path = as_path(place)
    if path.is_dir():
        inside, skipped = _among(files_under(path))
        if not inside:
            types = sorted({os.path.splitext(name)[1] or "no extension" for name in skipped})
            raise DataError(
                f"the folder {place!r} holds no images, which end in "
                f"{', '.join(sorted(SUFFIXES))}"
                + (f": it has {len(skipped):,} files of {', '.join(types[:8])}" if types else "")
            )
        report_skipped(skipped, place)
        return inside
    if path.exists():
        return [os.fspath(path)]
    matches = sorted(glob.glob(os.fspath(path), recursive=True))
    if not matches:
        wild = glob.has_magic(place)
        raise DataError(
            f"nothing matches {place!r}: check the pattern"
            if wild
            else f"there is no image {place!r}: check the path"
        )
    files: list[str] = []
    for match in matches:
        files += files_under(match) if os.path.isdir(match) else [match]
    images, skipped = _among(f for f in files if not os.path.basename(f).startswith("."))
    if not images:
        raise DataError(f"no image matches {place!r}: check the pattern")
    report_skipped(skipped, place)
    return images


def _among(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those that end like images, and the others; each sorted by path."""
    found = sorted(files)
    images = [file for file in found if is_image_name(file)]
    return images, [file for file in found if not is_image_name(file)]
