"""Requests to remote files: deadlines, a second request for slow reads, and counts of both.

A request fails when connecting, the first byte, or any later byte takes `STALL` seconds (a setting
of the client library), or when its bytes come slower than `MIN_RATE`. A read that is slower than
the 99th percentile of recent ones is sent a second time; the first answer counts. At most one read
in twenty is, so that a slow server does not get twice the load.
"""

import asyncio
import atexit
import collections
import errno
import functools
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
import fsspec.config

from vlm.data.hub_access import SCHEME, web_address
from vlm.errors import DataError, first_line
from vlm.paths import DRIVERS, gcs_timeout

logger = logging.getLogger(__name__)

STALL = 10.0  # seconds without a byte, after which a request fails
MIN_RATE = 64 << 10  # bytes per second of a whole read, beside `STALL`
LOG_SECONDS = 60.0  # between two log lines

_RECENT = 256  # durations kept, for each server and size
_TIMED = ("size", "info", "cat_file")
_ENOUGH = 20  # durations, before their percentile counts
_MIN_DELAY = 0.05  # seconds before a second request
_SHARE, _MAX_SPARE = 0.05, 10.0  # second requests per read, and how many may come in a row
_CAUSES = 8  # counted on their own
_LATE = "not complete after"
_GONE, _FORBIDDEN = (404, 410), (401, 403)  # HTTP statuses
_ALIASES = {"http": "http", "https": "http", "gs": "gs", "gcs": "gs", "s3": "s3", "s3a": "s3"}


class Requests:
    """Counts and recent durations of this process's requests; thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._recent: dict[Any, collections.deque[float]] = {}
        self._spare = _MAX_SPARE
        self._logged_at = -LOG_SECONDS
        self._unlogged = False
        self._last = ""
        self.reads = self.second = self.second_won = 0
        self.retried: collections.Counter[str] = collections.Counter()  # by cause

    def delay(self, key: Any) -> float:
        """Return the seconds after which a read of this kind counts as slow."""
        with self._lock:
            self.reads += 1
            self._spare = min(_MAX_SPARE, self._spare + _SHARE)
            recent = sorted(self._recent.get(key, ()))
        if len(recent) < _ENOUGH:
            return STALL / 2
        return min(max(_MIN_DELAY, recent[int(0.99 * len(recent))]), STALL / 2)

    def may_repeat(self, path: str) -> bool:
        """Count a second request; False if there were too many."""
        with self._lock:
            if self._spare < 1.0:
                return False
            self._spare -= 1.0
            self.second += 1
            self._last = f"{path}: slow"
        return True

    def took(self, key: Any, seconds: float, second_won: bool) -> None:
        """Note the duration of a read; of one that the second request beat, a lower bound."""
        with self._lock:
            self._recent.setdefault(key, collections.deque(maxlen=_RECENT)).append(seconds)
            self.second_won += second_won

    def failed(self, path: str, cause: str) -> None:
        """Count a request that failed and is retried."""
        with self._lock:
            known = cause in self.retried or len(self.retried) < _CAUSES
            self.retried[cause if known else "others"] += 1
            self._last = f"{path}: {cause}"

    def log(self, *, now: bool = False) -> None:
        """Log the counts, unless they did within `LOG_SECONDS` (or `now`)."""
        with self._lock:
            self._unlogged = True
            if not now and time.monotonic() - self._logged_at < LOG_SECONDS:
                return
            self._logged_at, self._unlogged = time.monotonic(), False
            text = self._describe()
        logger.warning("%s", text)

    def log_rest(self) -> None:
        """Log the counts at the end, if they changed since the last line."""
        if self._unlogged:
            self.log(now=True)

    def _describe(self) -> str:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in self.retried.most_common())
        return (
            f"remote storage: {self.reads:,} requests; failed and retried: "
            f"{self.retried.total():,}{f' ({causes})' if causes else ''}; slow and sent a second "
            f"time: {self.second:,} (the second was first: {self.second_won:,}); the last is "
            f"{self._last}"
        )


REQUESTS = Requests()


def _forget() -> None:
    global REQUESTS
    REQUESTS = Requests()  # a thread of the parent may hold its lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: REQUESTS.log_rest())


def ask(
    path: str, method: str, *, expected: int = 0, deadline_factor: int = 1, **options: Any
) -> Any:
    """Call a method of the file system of `path`, within its deadline.

    fsspec calls a file missing also after a failed request. Here only the statuses 404 and 410 mean
    that. Any other status, and a failed connection, become an OSError.

    Args:
        path: a URL.
        method: its name, such as "size" or "cat_file".
        expected: bytes of the answer. The deadline grows with it.
        deadline_factor: multiple of the deadline, for retries over a slow connection.
        options: arguments of the method.
    """
    system, inner = _system(path, of_web=method in _TIMED)
    try:
        if method not in _TIMED or not system.async_impl:
            return getattr(system, method)(inner, **options)
        key = (urlsplit(path)[:2], method, expected.bit_length() // 2)
        limited = expected or method != "cat_file"  # else the length is not known before
        deadline = (STALL + expected / MIN_RATE) * deadline_factor if limited else None
        read = functools.partial(getattr(system, f"_{method}"), inner, **options)
        return fsspec.asyn.sync(system.loop, _in_time, read, path, key, deadline)
    except FileNotFoundError as error:
        cause = error.__cause__
        status = getattr(cause, "status", None)
        client = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
        if status in _GONE or (status is None and not client):
            raise
        if status in _FORBIDDEN:
            raise PermissionError(f"{error}: the server answered {status}") from cause
        raise OSError(cause_of(cause) if isinstance(cause, Exception) else str(status)) from cause


async def _in_time(
    read: Callable[[], Awaitable[Any]], path: str, key: Any, deadline: float | None
) -> Any:
    """Await `read()`, and a second call once it is slow; TimeoutError after `deadline` seconds."""
    requests, start = REQUESTS, time.monotonic()
    delay = requests.delay(key)
    first = asyncio.ensure_future(read())
    second: asyncio.Future | None = None
    waiting = {first}
    try:
        await asyncio.wait(waiting, timeout=delay)
        if not first.done() and requests.may_repeat(path):
            second = asyncio.ensure_future(read())
            waiting.add(second)
            requests.log()
        error: BaseException | None = None
        while waiting:
            left = None if deadline is None else max(0.0, start + deadline - time.monotonic())
            done, waiting = await asyncio.wait(
                waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise TimeoutError(f"{_LATE} {deadline:.0f} s")
            for task in done:
                error = task.exception()
                if error is None:
                    won = task is second
                    requests.took(key, delay if won else time.monotonic() - start, won)
                    return task.result()
        assert error is not None
        raise error
    finally:
        for task in (first, second):
            if task is not None and not task.done():
                task.add_done_callback(lambda t: t.cancelled() or t.exception())
                task.cancel()


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of a client library's error."""
    status = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if status is None and isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is None:
        status = getattr(response, "status_code", None)
    if status is None:
        status = getattr(error, "code", None)  # gcsfs
    return int(status) if isinstance(status, int | str) and str(status).isdigit() else None


def cause_of(error: BaseException) -> str:
    """Describe in a few words why a request failed."""
    status = status_of(error)
    if status is not None:
        return f"the server answered {status}"
    name = type(error).__name__
    if isinstance(error, TimeoutError) or "Timeout" in name:
        why = str(error.__cause__ or error)
        return why if why.startswith(_LATE) else f"no answer or no byte for {STALL:g} s"
    if "Payload" in name or "IncompleteRead" in name:
        return "the answer was cut off"
    if getattr(error, "errno", None) == errno.ECONNRESET or "Disconnected" in name:
        return "the connection was reset"
    return first_line(error) if isinstance(error, Exception) else name


def check_status(error: Exception) -> None:
    """Raise FileNotFoundError or PermissionError if the server answered that."""
    status = status_of(error)
    if status in _GONE:
        raise FileNotFoundError(first_line(error)) from None
    if status in _FORBIDDEN:
        raise PermissionError(first_line(error)) from None


def is_async(path: str) -> bool:
    """Whether requests to `path` can be cancelled: of `http`, `gs`, `s3`, and files of the Hub."""
    if path.startswith(SCHEME):
        return importlib.util.find_spec("aiohttp") is not None
    return path.partition("://")[0] in _ALIASES


def glob_remote(pattern: str) -> list[str]:
    """List the files that match a pattern with `*`, in order."""
    scheme = pattern.split("://")[0]
    names = sorted(ask(pattern, "glob"))
    return [name if "://" in name else f"{scheme}://{name.lstrip('/')}" for name in names]


def _system(path: str, *, of_web: bool) -> tuple[Any, str]:
    """Return the file system of a path, and its name there; `of_web`: read the Hub's by HTTP."""
    if of_web and path.startswith(SCHEME) and is_async(path) and (page := web_address(path)):
        options = _timeouts("http")
        options["client_kwargs"] |= {"headers": page.headers}
        return fsspec.filesystem("http", **options, encoded=True), page.url
    try:
        return fsspec.core.url_to_fs(path, **_timeouts(path.partition("://")[0]))
    except (ImportError, ValueError) as error:
        scheme = path.split("://")[0]
        scheme = {"gcs": "gs"}.get(scheme, scheme)  # an alias
        package = "aiohttp" if scheme in ("http", "https") else DRIVERS.get(scheme, ("", ""))[1]
        fix = f"run pip install {package!r}" if package else "check data.source"
        raise DataError(f"there is no driver for {path} ({error}): {fix}") from None


def _timeouts(scheme: str) -> dict[str, Any]:
    """Return the options of a file system with its timeouts; those in fsspec's config go first."""
    kind = _ALIASES.get(scheme)
    if kind is None:
        return {}
    configured = {}
    for alias, other in _ALIASES.items():
        if other == kind:
            configured |= fsspec.config.conf.get(alias, {})
    if kind == "s3":
        ours: dict[str, Any] = {"connect_timeout": STALL, "read_timeout": STALL}
        return {"config_kwargs": ours | configured.get("config_kwargs", {})}
    try:
        import aiohttp
    except ImportError:
        return {}  # the driver is missing too
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
    if kind == "gs":
        own = configured.get("requests_timeout", timeout)
        return {"requests_timeout": timeout if own is gcs_timeout() else own}
    ours = {"timeout": timeout, "trust_env": True}  # as other clients, read HTTPS_PROXY
    return {"client_kwargs": ours | configured.get("client_kwargs", {})}
