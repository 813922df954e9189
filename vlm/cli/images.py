"""The IMAGES of a command: files, folders and globs as one list, and the unreadable ones."""

import glob
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from vlm.cli.model import load_model
from vlm.errors import DataError
from vlm.inputs.folders import files_under, report_skipped
from vlm.inputs.opening import ADDED_FORMATS, SUFFIXES, OnError
from vlm.inputs.videos import VIDEO_SUFFIXES
from vlm.paths import as_path, is_remote


class Kind(NamedTuple):
    """Kind of the input files of a command: its name, and the suffixes in folders."""

    name: str
    suffixes: frozenset[str]


IMAGE, VIDEO = Kind("image", SUFFIXES), Kind("video", VIDEO_SUFFIXES)


def find_images(
    places: Sequence[str], *, absolute: bool = False, kind: Kind = IMAGE
) -> list[epath.Path]:
    """Return the images, or videos, that `places` name, in order, without repeats.

    A file is accepted with any name. A folder, local or remote, is searched recursively for image
    suffixes, sorted by path, without hidden files. A pattern (`*`, `?`, `[...]`, `**`) is
    replaced by the files and folders that match. Files skipped for their type are counted in one
    message for each place; so are images of formats whose package is not installed. With
    `absolute`, local paths become absolute.

    Raises:
        DataError: a place that does not exist, or that has no images; or an image for a video.
    """
    files = (path for place in places for path in _images(place, kind))
    if absolute:
        files = (path if is_remote(path) else os.path.abspath(path) for path in files)
    return [as_path(path) for path in dict.fromkeys(files)]


def find_inputs(
    places: Sequence[str],
    model: str | None,
    video: int | None,
    *,
    absolute: bool = False,
) -> tuple[list[epath.Path], Any]:
    """Return the images that `places` name and the model; with `video`, videos and their encoder.

    The model is loaded last, so that a wrong place is reported at once.

    Raises:
        DataError: as `find_images`.
        ConfigError: a number of frames that the model does not take.
    """
    paths = find_images(places, absolute=absolute, kind=IMAGE if video is None else VIDEO)
    if video is None:
        return paths, load_model(model)
    from vlm.heads.video_encoder import VideoEncoder

    return paths, VideoEncoder(load_model(model), video)


def state_of(path: epath.PathLike) -> tuple[int, int | None]:
    """Return size in bytes and modification time (ns) of a file; (-1, None) if it is missing."""
    try:
        if is_remote(path):
            status = as_path(path).stat()
            return status.length, status.mtime
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except OSError:
        return -1, None


class Unreadable:
    """Unreadable images of a command: each is reported at once, and counted at the end.

    Args:
        total: number of images of the command; if it is one, its error is raised.
    """

    def __init__(self, total: int):
        self._total = total
        self._bad: set[str] = set()

    def handler(self, paths: Sequence[epath.Path]) -> OnError:
        """Return the `on_error` of an encoder that is given `paths`."""

        def on_error(position: int, error: DataError) -> None:
            if self._total == 1:
                raise error
            self._bad.add(os.fspath(paths[position]))
            print(f"vlm: {error}", file=sys.stderr, flush=True)

        return on_error

    def readable(self, paths: Sequence[epath.Path]) -> list[epath.Path]:
        """Return `paths` without the unreadable ones."""
        return [path for path in paths if os.fspath(path) not in self._bad]

    def add_earlier(self, names: set[str]) -> None:
        """Count images that an earlier run of the command could not read."""
        for name in sorted(names):
            print(f"vlm: {name} could not be read earlier", file=sys.stderr, flush=True)
        self._bad |= names

    def finish(self) -> None:
        """Raise a DataError with their number, if any image could not be read."""
        if self._bad:
            raise DataError(
                f"{len(self._bad):,} of {self._total:,} images could not be read and were left "
                "out: replace or remove those named above"
            )


def _images(place: str, kind: Kind) -> list[str]:
    path = as_path(place)
    if path.is_dir():
        images, skipped = _by_suffix(files_under(path), kind)
        if not images:
            types = sorted({os.path.splitext(name)[1] or "no extension" for name in skipped})
            raise DataError(
                f"the folder {place!r} holds no {kind.name}s, which end in "
                f"{', '.join(sorted(kind.suffixes))}"
                + (f": it has {len(skipped):,} files of {', '.join(types[:8])}" if types else "")
            )
    elif path.exists():
        suffix = os.path.splitext(place)[1].lower()
        if kind is VIDEO and suffix in SUFFIXES - VIDEO_SUFFIXES:
            raise DataError(f"{place!r} is an image file: leave out --video")
        return [os.fspath(path)]
    else:
        matches = sorted(glob.glob(os.fspath(path), recursive=True))
        if not matches and glob.has_magic(place):
            raise DataError(f"nothing matches {place!r}: check the pattern")
        if not matches:
            raise DataError(f"there is no {kind.name} {place!r}: check the path")
        files = [f for m in matches for f in (files_under(m) if os.path.isdir(m) else [m])]
        visible = (f for f in files if not os.path.basename(f).startswith("."))
        images, skipped = _by_suffix(visible, kind)
        if not images:
            raise DataError(f"no {kind.name} matches {place!r}: check the pattern")
    report_skipped(skipped, place, f"are no {kind.name}s")
    return _readable_formats(images, place)


def _readable_formats(images: list[str], place: str) -> list[str]:
    """Return the images without those of formats whose package is missing; log their number.

    Raises:
        DataError: there are no others.
    """
    for suffixes, module, extra, title in ADDED_FORMATS.values():
        lacking = [file for file in images if file.lower().endswith(suffixes)]
        if not lacking or importlib.util.find_spec(module) is not None:
            continue
        images = [file for file in images if not file.lower().endswith(suffixes)]
        fix = f'{title} needs another package (pip install "vlm-jax[{extra}]")'
        if not images:
            raise DataError(f"{place!r} has only {title} images ({len(lacking):,}): {fix}")
        report_skipped(lacking, place, f"are not read, because {fix}")
    return images


def _by_suffix(files: Iterable[str], kind: Kind) -> tuple[list[str], list[str]]:
    """Split files into those with a suffix of the kind and the others; each sorted by path."""
    images, others = [], []
    for file in sorted(files):
        ending = os.path.splitext(file)[1].lower()
        (images if ending in kind.suffixes else others).append(file)
    return images, others
