"""Files wherever they lie: names that stand for many, and reading front to back with retries.

A path on this machine's disk, or a URL of a bucket (`gs://`, `s3://`), the Hub (`hf://`) or a web
server (`http://`, `https://`), through the file systems of `fsspec`.
"""

import contextlib
import glob
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from vlm.errors import DataError, first_line
from vlm.paths import DRIVERS, cache_dir, is_remote

T = TypeVar("T")

CHUNK = 4 << 20  # bytes of one read: large, so that a bucket's latency is small beside it
READERS = 16  # threads that wait for the disk or the bucket
ATTEMPTS = 5  # at a read that fails for a moment
BACKOFF = 0.5  # seconds before the second attempt, doubled for each one after

# What will not get better by itself.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_GONE, _FORBIDDEN = (404, 410), (401, 403)  # HTTP's statuses of what is not there, or not for us
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_WILD = re.compile(r"[*?\[]")


def expand(pattern: str) -> list[str]:
    """The files that a pattern names, in order: ranges `{000..099}`, lists `{a,b}`, `*` and `::`.

    `::` stands between patterns. What is named one by one need not exist; what matches `*` does.

    Raises:
        DataError: a pattern with `*` matches nothing.
    """
    files = []
    for part in pattern.split("::"):
        for name in _braces(part.strip()):
            files += _matches(name) if _WILD.search(name) else [os.path.expanduser(name)]
    if not files or not all(files):
        raise DataError(f"there are no shards {pattern}: check data.source")
    return files


def list_files(pattern: str) -> list[str]:
    """The files that match a pattern with `*`, in order; none of a web server, which lists nothing.

    Raises:
        OSError: as the file system says.
    """
    return [] if pattern.startswith(("http://", "https://")) else _matches(pattern)


def open_file(path: str) -> Any:
    """A binary file open for reading, local or remote, that can seek and buffers nothing itself.

    Raises:
        OSError: as the file system says.
        DataError: there is no driver for this kind of URL.
    """
    if not is_remote(path):
        return open(path, "rb", buffering=0)
    system, inner = _system(path)
    with _telling_missing():
        return system.open(inner, "rb", cache_type="none", block_size=CHUNK)


def size_of(path: str) -> int:
    """The length of a file in bytes, asked for again where that may help.

    Raises:
        OSError: as the file system says.
    """
    if not is_remote(path):
        return os.stat(path).st_size
    system, inner = _system(path)

    def size() -> int:
        with _telling_missing():
            return system.size(inner)

    return retry(size)


def read_file(path: str) -> bytes:
    """A whole file, tried again where that may help.

    Raises:
        OSError: as the file system says.
    """

    def read() -> bytes:
        with open_file(path) as f:
            return f.read()

    return retry(read)


def read_range(path: str, start: int, end: int) -> bytes:
    """The bytes of a file from `start` to before `end`, by one request.

    Raises:
        OSError: as the file system says.
    """

    def read() -> bytes:
        if is_remote(path):
            system, inner = _system(path)
            with _telling_missing():
                return system.cat_file(inner, start=start, end=end)
        with open(path, "rb", buffering=0) as f:
            f.seek(start)
            return f.read(end - start)

    return retry(read)


def cache_path(files: Sequence[str], suffix: str, *more: str) -> str:
    """Where this machine keeps what is made of these files, and of `more` that it depends on.

    What changes a file changes its length or its time, and so the name.
    """
    folder = cache_dir() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(READERS) as pool:
        said = "\n".join([*pool.map(stamp_of, files), *more])
    return os.fspath(folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}{suffix}")


def stamp_of(path: str) -> str:
    """A text that changes when a file does: of its path, its length and, on a disk, its time."""
    try:
        if is_remote(path):
            return f"{path} {size_of(path)}"
        stat = os.stat(path)
        return f"{path} {stat.st_size} {stat.st_mtime_ns}"
    except OSError:
        return f"{path} missing"


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return os.path.exists(path)
    try:
        size_of(path)  # which asks a busy server again
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _telling_missing() -> Iterator[None]:
    """Tell a missing file from a server that did not answer; fsspec calls both missing.

    Only the statuses 404 and 410 mean that a file is not there. Any other status, and a connection
    that failed, becomes an OSError, after which `retry` tries again.
    """
    try:
        yield
    except FileNotFoundError as error:
        cause = error.__cause__
        status = getattr(cause, "status", None)
        client = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
        if status in _GONE or (status is None and not client):
            raise
        if status in _FORBIDDEN:
            raise PermissionError(f"{error}: the server answered {status}") from cause
        why = first_line(cause) if isinstance(cause, Exception) else status
        raise OSError(f"{error}: {why}") from cause


def retry(action: Callable[[], T]) -> T:
    """What `action` returns; after an error that may pass it is tried again, later each time.

    Raises:
        OSError: the last error, or one that will not pass.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (*_FINAL, DataError):
            raise
        except Exception as error:  # each file system has kinds of its own
            if attempt == ATTEMPTS - 1:
                raise error if isinstance(error, OSError) else OSError(first_line(error)) from None
            time.sleep(BACKOFF * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


class SequentialFile:
    """A file read from `offset` to its end in large pieces, opened again where a read fails."""

    def __init__(self, path: str, offset: int = 0, chunk: int = CHUNK):
        self._path, self._chunk = path, chunk
        self._file: Any = None
        self._buffer = memoryview(b"")
        self.offset = offset  # of the next byte that `read` gives

    @classmethod
    def of(cls, data: bytes) -> "SequentialFile":
        """The same over bytes that are there already."""
        file = cls("")
        file._buffer = memoryview(data)
        return file

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end of the file.

        Raises:
            OSError: the file is not there, or cannot be read after several attempts.
        """
        parts = []
        left = count
        while left:
            if not len(self._buffer):
                self._buffer = memoryview(retry(self._more))
                if not len(self._buffer):
                    break
            part = self._buffer[:left]
            parts.append(part)
            self._buffer = self._buffer[len(part) :]
            self.offset += len(part)
            left -= len(part)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        inside = min(count, len(self._buffer))
        self._buffer = self._buffer[inside:]
        self.offset += count
        if count > inside and self._file is not None:
            self._file.seek(self.offset)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _more(self) -> bytes:
        if not self._path:
            return b""
        try:
            if self._file is None:
                self._file = open_file(self._path)
                if self.offset:
                    self._file.seek(self.offset)
            return self._file.read(self._chunk)
        except BaseException:
            try:
                self.close()
            except Exception:
                self._file = None
            raise


def _braces(pattern: str) -> list[str]:
    found = [f for regex in (_RANGE, _LIST) if (f := regex.search(pattern))]
    if not found:
        return [pattern]
    first = min(found, key=lambda f: f.start())
    options = _range(first) if first.re is _RANGE else first[1].split(",")
    rests = _braces(pattern[first.end() :])
    return [f"{pattern[: first.start()]}{option}{rest}" for option in options for rest in rests]


def _range(found: re.Match) -> list[str]:
    first, last = found.groups()
    return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(os.path.expanduser(pattern)))
    scheme = pattern.split("://")[0]
    system, inner = _system(pattern)
    names = sorted(retry(lambda: system.glob(inner)))
    return [name if "://" in name else f"{scheme}://{name.lstrip('/')}" for name in names]


def _system(path: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        scheme = path.split("://")[0]
        scheme = {"gcs": "gs"}.get(scheme, scheme)  # another name of the same
        package = "aiohttp" if scheme in ("http", "https") else DRIVERS.get(scheme, ("", ""))[1]
        mend = f"run pip install {package!r}" if package else "check data.source"
        raise DataError(f"there is no driver for {path} ({error}): {mend}") from None
