"""Local and remote paths, and the cache folder. A remote path is `gs://...` or `s3://...`."""

import os

from etils import epath

from vlm.errors import ConfigError


def cache_dir() -> epath.Path:
    """The folder for what can be made again: prepared data, compiled programs.

    `$VLM_CACHE` if set, else `$XDG_CACHE_HOME/vlm`, else `~/.cache/vlm`. It is made when missing.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    chosen = os.environ.get("VLM_CACHE")
    # The XDG base directory specification: an empty or relative value counts as unset.
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else "~/.cache"
    path = as_path(chosen or os.path.join(base, "vlm"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {os.fspath(path)!r} cannot be made ({error.strerror or error}): "
            "set VLM_CACHE to a folder that you can write"
        ) from None
    return path


def as_path(path: epath.PathLike) -> epath.Path:
    """`path` with `~` expanded; `gs://` and `s3://` stay remote.

    Raises:
        ConfigError: an address of the web, or of another kind that is not read.
    """
    try:
        return epath.Path(path).expanduser()
    except KeyError:  # by which epath says that it does not know the scheme
        scheme = os.fspath(path).partition("://")[0]
    if scheme.lower() in ("http", "https", "ftp"):
        raise ConfigError(
            f"{path} is an address of the web, from which nothing is read: download it first, and "
            "give the path of the file"
        )
    raise ConfigError(f"{path} begins with {scheme}://: give a local path, or gs:// or s3://")


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` names a bucket rather than this machine's disk."""
    return "://" in os.fspath(path)
