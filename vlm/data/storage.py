"""Local and remote files: expansion of patterns, and reads with retries.

A file is a local path, or a URL of a bucket (`gs://`, `s3://`), the Hub (`hf://`) or a web server
(`http://`, `https://`), read through `fsspec`. Functions raise OSError, as the file system does.
"""

import glob
import hashlib
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from vlm.data import remote
from vlm.data.hub_access import check_access
from vlm.data.open_files import LocalFile, PositionedFile
from vlm.errors import DataError, first_line
from vlm.paths import as_path, cache_dir, is_remote

T = TypeVar("T")

CHUNK = 4 << 20  # bytes of one read; large, to amortise the latency of a bucket
READERS = 16  # I/O threads
ATTEMPTS = 7  # per read
BACKOFF = 0.1  # seconds before the second attempt, doubled for each later one
_PIECE = 32 << 20  # bytes of the largest request of a file that is read by position
GIVE_UP = 60.0  # seconds, after which no other attempt starts

# Errors that are not retried.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_CHECKSUMS = ("ETag", "etag", "md5Hash", "Last-Modified", "mtime")  # of fsspec's file systems
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_WILD = re.compile(r"[*?\[]")


class ReadFailedError(OSError):
    """Error for a read that failed in all attempts; it is not retried again in this process."""

    retriable = True


def expand(pattern: str) -> list[str]:
    """Expand a pattern to file names, in order: ranges `{000..099}`, lists `{a,b}`, `*` and `::`.

    `::` separates patterns. Only `*` is matched against existing files. DataError if a pattern with
    `*` matches nothing.
    """
    files = []
    for part in pattern.split("::"):
        for name in _braces(part.strip()):
            check_access(name)
            files += _matches(name) if _WILD.search(name) else [os.path.expanduser(name)]
    if not files or not all(files):
        raise DataError(f"there are no shards {pattern}: check data.source")
    return files


def list_files(pattern: str) -> list[str]:
    """List the files that match a pattern with `*`, in order; empty for a web server."""
    check_access(pattern)
    return [] if pattern.startswith(("http://", "https://")) else _matches(pattern)


class RemoteInfo(NamedTuple):
    """Length of a remote file, whether parts of it can be read, and a text that changes with it."""

    size: int | None
    parts: bool
    stamp: str


def remote_info(path: str) -> RemoteInfo:
    """Look up a remote file, with retries."""
    info = retry(lambda: remote.ask(path, "info"), path)
    size = info.get("size")
    own = [f"{name}={info[name]}" for name in _CHECKSUMS if info.get(name)]
    parts = remote.is_async(path) and bool(size and info.get("partial", True))
    return RemoteInfo(size, parts, " ".join([path, str(size), *own]))


def open_file(path: str, info: RemoteInfo | None = None) -> Any:
    """Open a local or remote file for unbuffered binary reads with seek.

    With the `info` of a remote file, it is not looked up again.
    """
    if not is_remote(path):
        return LocalFile(path)
    if remote.is_async(path):
        info = info or remote_info(path)
        if info.parts:
            return RemoteFile(path, info.size or 0)
    return remote.ask(path, "open", mode="rb", cache_type="none", block_size=CHUNK)


def size_of(path: str) -> int:
    """Return the length of a file in bytes, with retries."""
    if is_remote(path):
        return retry(lambda: remote.ask(path, "size"), path)
    return os.stat(path).st_size


def read_file(path: str) -> bytes:
    """Read a whole file, with retries."""

    def read() -> bytes:
        if remote.is_async(path):
            return remote.ask(path, "cat_file")
        with open_file(path) as f:
            return f.read()

    return retry(read, path)


def read_range(path: str, start: int, end: int) -> bytes:
    """Read bytes `start` to `end` (exclusive) of a file in one request, with retries."""
    if end <= start:
        return b""

    def read(attempt: int) -> bytes:
        if is_remote(path):
            data = remote.ask(
                path,
                "cat_file",
                expected=end - start,
                deadline_factor=2**attempt,
                start=start,
                end=end,
            )
            if len(data) > end - start:
                raise DataError(
                    f"the server of {path} sends the whole file for a part of it: use a server "
                    "with range requests, or download the file"
                )
            return data
        with open(path, "rb", buffering=0) as f:
            f.seek(start)
            return f.read(end - start)

    return retry_attempts(read, path)


def write_whole(path: str, *parts: bytes) -> None:
    """Write a file, under a temporary name until it is complete."""
    if is_remote(path):  # objects in a bucket appear when they are complete
        as_path(path).write_bytes(b"".join(parts))
        return
    handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path) or ".")
    with os.fdopen(handle, "wb") as f:
        f.writelines(parts)
    os.replace(unfinished, path)


def cache_path(files: Sequence[str], suffix: str, *more: str) -> str:
    """Return the path in the local cache for data derived from `files` and `more`.

    The name is a hash of the paths, lengths and modification times, so it changes with the files.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return hashed_path("\n".join([*pool.map(stamp_of, files), *more]).encode(), suffix)


def hashed_path(data: bytes, suffix: str) -> str:
    """Return the path in the local cache for `data`, by its hash."""
    folder = cache_dir() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    return os.fspath(folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}")


def stamp_of(path: str) -> str:
    """Return a text that changes with a file: path, length, and modification time or checksum."""
    try:
        if is_remote(path):
            return remote_info(path).stamp
        stat = os.stat(path)
        return f"{path} {stat.st_size} {stat.st_mtime_ns}"
    except OSError:
        return f"{path} missing"


def exists(path: str) -> bool:
    """Whether a file exists; DataError if its server does not tell.

    A file that may not be read counts as missing, as S3 answers 403 for both.
    """
    if not is_remote(path):
        return os.path.exists(path)
    try:
        size_of(path)  # with retries
    except _PERMANENT:
        return False
    except OSError as error:
        why = first_line(error)
        raise DataError(f"{path} cannot be looked up ({why}): try again later") from None
    return True


def retry(action: Callable[[], T], path: str = "") -> T:
    """Call `action`, with retries after temporary errors; ReadFailedError if all fail.

    The pauses between them are random, and grow exponentially. Those of a remote `path` are counted
    and logged.
    """
    return retry_attempts(lambda attempt: action(), path)


def retry_attempts(action: Callable[[int], T], path: str = "") -> T:
    """Do as `retry`, with the number of the attempt (from 0) as the argument of `action`."""
    start = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return action(attempt)
        except (*_PERMANENT, DataError, ReadFailedError):
            raise
        except Exception as error:  # each file system has its own types
            remote.check_status(error)
            cause, seconds = remote.cause_of(error), time.monotonic() - start
            if is_remote(path):
                remote.REQUESTS.failed(path, cause)
                remote.REQUESTS.log()
            if attempt == ATTEMPTS - 1 or seconds > GIVE_UP:
                raise ReadFailedError(
                    f"{cause}; it was tried {attempt + 1} times in {seconds:.0f} s"
                ) from error
            time.sleep(BACKOFF * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


class RemoteFile(PositionedFile):
    """Remote file of a known size, whose reads are requests with deadlines and retries."""

    def __init__(self, path: str, size: int):
        super().__init__(path)
        self._size = size

    def _length(self) -> int:
        return self._size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, or to the end; fewer only at the end of the file."""
        left = max(0, self._size - self._place)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self._size - self._place))
        for start in range(0, count, _PIECE):
            wanted = min(_PIECE, count - start)
            data = read_range(self._path, self._place, self._place + wanted)
            if len(data) < wanted:
                raise ReadFailedError(f"it has fewer than its {self._size:,} bytes")
            buffer[start : start + wanted] = data
            self._place += wanted
        return count


class SequentialFile:
    """File that is read sequentially in large chunks and reopened after a failed read."""

    def __init__(self, path: str, offset: int = 0, chunk: int = CHUNK):
        self._path, self._chunk = path, chunk
        self._file: Any = None
        self._buffer = memoryview(b"")
        self.offset = offset  # of the next byte to read

    @classmethod
    def of(cls, data: bytes) -> "SequentialFile":
        """Make a file over bytes in memory."""
        file = cls("")
        file._buffer = memoryview(data)
        return file

    def read(self, count: int) -> bytes:
        """Read the next `count` bytes; fewer at the end of the file."""
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
        """Skip `count` bytes."""
        inside = min(count, len(self._buffer))
        self._buffer = self._buffer[inside:]
        self.offset += count
        if count > inside and self._file is not None:
            self._file.seek(self.offset)

    def close(self) -> None:
        """Close the file."""
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
    matches = [f for regex in (_RANGE, _LIST) if (f := regex.search(pattern))]
    if not matches:
        return [pattern]
    first = min(matches, key=lambda f: f.start())
    if first.re is _RANGE:
        numbers = range(int(first[1]), int(first[2]) + 1)
        options = [str(number).zfill(len(first[1])) for number in numbers]
    else:
        options = first[1].split(",")
    rests = _braces(pattern[first.end() :])
    return [f"{pattern[: first.start()]}{option}{rest}" for option in options for rest in rests]


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(os.path.expanduser(pattern)))
    return retry(lambda: remote.glob_remote(pattern), pattern)
