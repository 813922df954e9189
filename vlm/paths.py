"""Local and remote paths, the cache folder, and the lines of text files.

A remote path is `gs://...` or `s3://...`.
"""

import codecs
import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator

from etils import epath

from vlm.errors import ConfigError, DataError, VlmError

# What reads each kind of bucket, and what to install to have it.
DRIVERS = {
    "gs": ("gcsfs", "vlm-jax[gcs]"),
    "s3": ("s3fs", "vlm-jax[s3]"),
    "az": ("adlfs", "adlfs"),
}


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
        ConfigError: an address of the web, or of another kind that is not read, or whose driver is
            not installed.
    """
    scheme, remote, _ = os.fspath(path).partition("://")
    driver, package = DRIVERS.get(scheme, (None, None)) if remote else (None, None)
    if driver is not None and importlib.util.find_spec(driver) is None:
        raise ConfigError(f"{scheme}:// paths need {driver}: run pip install {package!r}")
    try:
        return epath.Path(path).expanduser()
    except KeyError:  # by which epath says that it does not know the scheme
        pass
    if scheme.lower() in ("http", "https", "ftp"):
        raise ConfigError(
            f"{path} is an address of the web, from which nothing is read: download it first, and "
            "give the path of the file"
        )
    raise ConfigError(f"{path} begins with {scheme}://: give a local path, or gs:// or s3://")


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` names a bucket rather than this machine's disk."""
    return "://" in os.fspath(path)


def on_disk(path: epath.PathLike) -> epath.Path:
    """`path` from the root of the disk. A remote path is whole already (epath would break it)."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).absolute()


def decode_text(data: bytes, where: str) -> str:
    """The text of a file: UTF-8, or UTF-16 with the mark that spreadsheets write before it.

    Raises:
        DataError: it is neither.
    """
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not a UTF-8 text ({error.reason}): save it as UTF-8") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end in a line feed, a carriage return, or both.

    `str.splitlines` ends them at U+2028, U+0085 and form feeds too, which are part of a caption.

    Example:
        >>> from vlm.paths import lines_of
        >>> len(lines_of("one\u2028line" + chr(10) + "another" + chr(10)))
        2
    """
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


@contextlib.contextmanager
def as_config_error(what: str, fix: str) -> Iterator[None]:
    """Errors of a disk or bucket in here end as "WHAT (why): FIX".

    Raises:
        ConfigError: that sentence; for a bucket it says what is wrong with it, or with the
            credentials.
    """
    try:
        yield
    except VlmError:
        raise
    except Exception as error:  # the clients of buckets have errors of their own
        why = storage_error_reason(error)
        if why is None:
            raise
        raise ConfigError(f"{what} ({why}): {fix}") from error


# What the clients of buckets say, by a part of it, and what that means. The first that fits counts.
_MEANINGS = {
    ("default credentials", "invalid credentials", "anonymous caller", "unauthenticated", " 401",
     "'code': 401"): "the machine has no credentials for it: run `gcloud auth application-default "
    "login`, or give the machine a service account",
    ("unable to locate credentials", "invalidaccesskeyid"): "the machine has no credentials for "
    "it: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
    ("forbidden", "permission_denied", "permission denied", " 403", "'code': 403"):
    "the machine's account may not do this: grant it Storage Object Admin on the bucket, or on one "
    "of s3:// the rights to list, read and write",
    ("bucket does not exist", "/upload/storage", "specified bucket", "bucket not found"):
    "there is no such bucket",
}  # fmt: skip
_CLIENTS = {"gcsfs", "aiohttp", "google", "requests", "urllib3", "fsspec", "botocore", "s3fs"}


def storage_error_reason(error: Exception) -> str | None:
    """Why a disk or bucket refused, in a few words; None for an error of another kind."""
    said = " ".join(f"{type(error).__name__} {error}".split())
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    of_tensorstore = isinstance(error, ValueError) and re.match(r"[A-Z_]{5,}: ", str(error))
    client = type(error).__module__.split(".")[0] in _CLIENTS
    if not (isinstance(error, OSError) or client or of_tensorstore):
        return None
    for signs, meaning in _MEANINGS.items():
        if any(sign in said.lower() for sign in signs):
            return meaning
    return said[:300]


def keep_compiled_programs() -> None:
    """Keep what JAX compiles in the cache folder, unless the user has said where or not to."""
    import jax  # this module is light for those who only name paths

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", os.fspath(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def is_run(folder: epath.Path) -> bool:
    """Whether a folder is a run's; Hugging Face folders have a config.json of another kind."""
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in ("bundle", "checkpoints")
    )
