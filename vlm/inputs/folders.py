"""Image files under a folder, and a report of the files that were skipped."""

import collections
import os
from collections.abc import Iterable, Iterator

from etils import epath

from vlm.errors import DataError, warn_once
from vlm.inputs.opening import SUFFIXES
from vlm.paths import as_path, is_remote

_SHOWN = 3  # skipped files that are named, per type


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image format (`vlm.inputs.opening.FORMATS`)."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def files_under(folder: epath.PathLike) -> Iterator[str]:
    """Yield the files under a folder, recursively and in order, without hidden ones.

    Symbolic links to folders are followed, except to one of their parent folders. DataError if a
    folder cannot be read.
    """
    folder = as_path(folder)
    if is_remote(folder):
        for parent, folders, names in folder.walk():
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (os.fspath(parent / n) for n in sorted(names) if not n.startswith("."))
        return
    yield from _walk(os.fspath(folder), ())


def _walk(folder: str, parents: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(
                (entry for entry in scanned if not entry.name.startswith(".")), key=lambda e: e.name
            )
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read ({error.strerror}): make it readable, or move it"
        ) from None
    folders = [entry.path for entry in entries if entry.is_dir()]
    inside = set(folders)
    yield from (entry.path for entry in entries if entry.path not in inside)
    for path in folders:
        yield from _walk(path, (*parents, real))


def report_skipped(files: Iterable[str], place: str, why: str = "are no images") -> None:
    """Log how many files of each type were skipped, with some of their names."""
    by_type = collections.defaultdict(list)
    for file in files:
        by_type[os.path.splitext(file)[1].lower() or "no extension"].append(file)
    if not by_type:
        return
    count = sum(map(len, by_type.values()))
    types = "; ".join(
        f"{len(names):,} of {kind} ({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})"
        for kind, names in sorted(by_type.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    warn_once(
        f"skipped {count:,} {'file' if count == 1 else 'files'} in {place} that {why}: {types}"
    )
