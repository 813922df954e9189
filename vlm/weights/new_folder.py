"""Write a folder atomically, without overwriting anything else."""

import contextlib
import ctypes
import os
import uuid
from collections.abc import Iterator

from etils import epath

from vlm.errors import CheckpointError
from vlm.paths import as_path, is_remote


@contextlib.contextmanager
def new_folder(folder: epath.PathLike, files: frozenset[str] | None = None) -> Iterator[epath.Path]:
    """Yield a hidden folder to write into; rename it to `folder` if the block succeeds.

    With `files`, an empty folder or one that has exactly these files is replaced. Anything else at
    that path is an error before the block starts. A symbolic link stays, and its target is
    replaced.

    Raises:
        CheckpointError: something else is there, or the folder cannot be written.
    """
    path = as_path(folder)
    if not is_remote(path):
        try:
            path = epath.Path(os.path.realpath(path, strict=path.exists()))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from None
    _check_target(path, folder, files)
    name = f".{path.name}.{uuid.uuid4().hex[:8]}"
    new, old = path.parent / f"{name}.new", path.parent / f"{name}.old"
    try:
        new.mkdir(parents=True)
        yield new
        if not path.exists():
            new.rename(path)
        elif not _exchange(new, path):
            path.rename(old)
            new.rename(path)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{folder} cannot be written: {reason}") from None
    finally:
        for leftover in (new, old):
            with contextlib.suppress(OSError):
                if leftover.exists():
                    leftover.rmtree()


def _check_target(path: epath.Path, shown: epath.PathLike, files: frozenset[str] | None) -> None:
    """Raise an error if the path has something that must not be replaced."""
    if not path.exists():
        return
    if files is None:
        raise CheckpointError(f"{shown} exists already: give the path of a new folder")
    if not path.is_dir():
        raise CheckpointError(f"{shown} is a file: give the path of a new folder")
    there = {file.name for file in path.iterdir()}
    if not there:
        return
    if missing := sorted(files - there):
        raise CheckpointError(
            f"{shown} exists already and is no bundle, for it has no {missing[0]}: give the path "
            "of a new folder"
        )
    if unexpected := sorted(there - files):
        raise CheckpointError(
            f"{shown} holds {unexpected[0]} beside a bundle, which would be lost: move it, or give "
            "the path of a new folder"
        )


_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def _exchange(a: epath.Path, b: epath.Path) -> bool:
    """Swap two folders in one step; return False where the system cannot."""
    if is_remote(a):
        return False
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another system than Linux
        return False
    return swap(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0
