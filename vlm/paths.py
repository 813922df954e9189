"""Local and remote paths, the cache folder, and the lines of text files.

A remote path is `gs://...` or `s3://...`.
"""

import codecs
import contextlib
import errno
import functools
import importlib.util
import os
import re
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from vlm.errors import ConfigError, DataError, VlmError

# For each scheme, the fsspec driver and the package to install.
DRIVERS = {
    "gs": ("gcsfs", "vlm-jax[gcs]"),
    "s3": ("s3fs", "vlm-jax[s3]"),
    "az": ("adlfs", "adlfs"),
}


STALL = 60.0  # seconds without a byte, after which a request to a bucket fails
LISTING_AGE = 5.0  # seconds that a listing of a bucket is cached; fsspec would keep it without end


def cache_dir() -> epath.Path:
    """Return the cache folder, which holds prepared data and compiled programs.

    `$VLM_CACHE` if set, else `$XDG_CACHE_HOME/vlm`, else `~/.cache/vlm`. It is created if missing.

    Raises:
        ConfigError: the folder cannot be created or written.
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
            f"the cache folder {os.fspath(path)!r} cannot be created ({error.strerror or error}): "
            "set VLM_CACHE to a folder that you can write"
        ) from None
    return path


def as_path(path: epath.PathLike) -> epath.Path:
    """Convert `path` to an `epath.Path`, with `~` expanded; `gs://` and `s3://` stay remote.

    Raises:
        ConfigError: a web address or another unsupported scheme, or a driver that is not installed.
    """
    scheme, remote, _ = os.fspath(path).partition("://")
    driver, package = DRIVERS.get(scheme, (None, None)) if remote else (None, None)
    if driver is not None and importlib.util.find_spec(driver) is None:
        raise ConfigError(f"{scheme}:// paths need {driver}: run pip install {package!r}")
    if driver is not None:
        _configure_clients()
    try:
        return epath.Path(path).expanduser()
    except KeyError:  # epath does not support the scheme
        pass
    if scheme.lower() in ("http", "https", "ftp"):
        raise ConfigError(
            f"{path} is a web address, which vlm does not read: download it first, and give the "
            "path of the file"
        )
    raise ConfigError(f"{path} begins with {scheme}://: give a local path, or gs:// or s3://")


@functools.cache
def gcs_timeout() -> Any:
    """Return the timeouts of requests to gs:// that set none: gcsfs would wait without end."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)


@functools.cache
def _configure_clients() -> None:
    """Give requests to gs:// a deadline, and listings an age, unless fsspec has others."""
    import fsspec.config

    conf = fsspec.config.conf

    def set_default(names: tuple[str, ...], option: str, value: Any) -> None:
        if not any(option in conf.get(name, {}) for name in names):
            conf.setdefault(names[0], {})[option] = value

    if importlib.util.find_spec("gcsfs") is not None:
        set_default(("gs", "gcs"), "requests_timeout", gcs_timeout())
    for names in (("gs", "gcs"), ("s3", "s3a"), ("az", "abfs")):
        set_default(names, "listings_expiry_time", LISTING_AGE)


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` names a bucket rather than this machine's disk."""
    return "://" in os.fspath(path)


def on_disk(path: epath.PathLike) -> epath.Path:
    """Make a local path absolute. Remote paths are absolute already (epath would break them)."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).absolute()


def replace_text(file: epath.PathLike, text: str) -> None:
    """Write a file that readers find either as before or complete, even if the writer is killed."""
    file = epath.Path(file)
    if is_remote(file):  # objects of a bucket are replaced as a whole
        file.write_text(text)
    else:
        part = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
        part.write_text(text)
        part.replace(file)


def decode_text(data: bytes, where: str) -> str:
    """Decode a text file: UTF-8, or UTF-16 with the byte order mark that spreadsheets write.

    Raises:
        DataError: the bytes are neither.
    """
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error.reason}): save it as UTF-8") from None


def lines_of(text: str) -> list[str]:
    """Split a text into lines, which end in a line feed, a carriage return, or both.

    `str.splitlines` also splits at U+2028, U+0085 and form feeds, which may be part of a caption.

    Example:
        >>> from vlm.paths import lines_of
        >>> len(lines_of("one\u2028line" + chr(10) + "another" + chr(10)))
        2
    """
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


@contextlib.contextmanager
def as_config_error(what: str, fix: str) -> Iterator[None]:
    """Context manager that re-raises disk and bucket errors as ConfigError "WHAT (why): FIX".

    Raises:
        ConfigError: with that message; the reason covers missing buckets and credentials.
    """
    try:
        yield
    except VlmError:
        raise
    except Exception as error:  # bucket clients have their own exception types
        why = storage_error_reason(error)
        if why is None:
            raise
        failure = ConfigError(f"{what} ({why}): {fix}")
        failure.retriable = is_outage(error)
        raise failure from error


# Substrings of bucket clients' messages, and the reason to report. The first match counts.
_MEANINGS = {
    ("default credentials", "invalid credentials", "anonymous caller", "unauthenticated", " 401",
     "'code': 401"): "the machine has no credentials for it: run `gcloud auth application-default "
    "login`, or give the machine a service account",
    ("unable to locate credentials", "invalidaccesskeyid"): "the machine has no credentials for "
    "it: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
    ("forbidden", "permission_denied", "permission denied", " 403", "'code': 403"):
    "the machine's account has no permission for this: grant it Storage Object Admin on the "
    "bucket, or for s3:// the rights to list, read and write",
    ("bucket does not exist", "/upload/storage", "specified bucket", "bucket not found"):
    "there is no such bucket",
}  # fmt: skip
_CLIENTS = {"gcsfs", "aiohttp", "google", "requests", "urllib3", "fsspec", "botocore", "s3fs"}


def storage_error_reason(error: Exception) -> str | None:
    """Return why a disk or bucket operation failed; None for an error of another kind."""
    message = " ".join(f"{type(error).__name__} {error}".split())
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    of_tensorstore = isinstance(error, ValueError) and re.match(r"[A-Z_]{5,}: ", str(error))
    client = type(error).__module__.split(".")[0] in _CLIENTS
    if not (isinstance(error, OSError) or client or of_tensorstore):
        return None
    for signs, meaning in _MEANINGS.items():
        if any(sign in message.lower() for sign in signs):
            return meaning
    return message[:300]


_OUTAGES = {"EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED",
            "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO"}  # fmt: skip


def is_outage(error: Exception) -> bool:
    """Whether a disk or bucket operation failed for a reason that may pass by itself."""
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno) in _OUTAGES
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    reason = storage_error_reason(error)
    return reason is not None and reason not in _MEANINGS.values()


def caused_by_outage(error: BaseException | None) -> bool:
    """Whether an error, or one of those that it was raised for, is an outage that may pass."""
    while error is not None:
        known = isinstance(error, OSError) and error.errno is not None and is_outage(error)
        if known or getattr(error, "retriable", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def keep_compiled_programs() -> None:
    """Enable JAX's compilation cache in the cache folder, unless the user has configured one.

    It is disabled for several processes on CPUs. There some processes would load a program and
    others compile it, with another order of collectives, which ends in an error of Gloo.
    """
    import jax  # imported here: users of plain paths do not need JAX

    if jax.distributed.is_initialized() and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", os.fspath(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def is_run(folder: epath.Path) -> bool:
    """Whether a folder is a run folder; Hugging Face folders have a config.json of another kind."""
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in ("bundle", "checkpoints")
    )
