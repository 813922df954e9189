"""The open files of a process: opened when first read, and the most recent ones kept open.

Data sets may have more files than a process may open (`ulimit -n`), and streams read from many at
the same time.
"""

import collections
import contextlib
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

_MAX_OPEN = 256
_SHARE = 4  # of the process's limit, one in so many; the others are for sockets and libraries


class OpenFiles:
    """The most recently used open files; thread-safe.

    Args:
        limit: files to keep open. Those in use are never closed, so more may be open for a moment.
    """

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self._kept: collections.OrderedDict[Any, _Kept] = collections.OrderedDict()
        self._forgotten: collections.deque[Any] = collections.deque()

    def __len__(self) -> int:
        return len(self._kept)

    @contextlib.contextmanager
    def use(self, key: Any, open: Callable[[], Any], close: Callable[[Any], None]) -> Iterator[Any]:
        """Yield the open file of `key`, made by `open` if needed; several threads may share it."""
        with self._lock:
            kept = self._kept.setdefault(key, _Kept(close))
            self._kept.move_to_end(key)
            kept.users += 1
        try:
            with kept.lock:  # of several threads only one opens it
                if kept.file is None:
                    kept.file = open()
            yield kept.file
        finally:
            with self._lock:
                kept.users -= 1
                if kept.file is None:
                    self._forgotten.append(key)
                unneeded = self._take_unneeded()
            for other in unneeded:
                other.close(other.file)

    def forget(self, key: Any) -> None:
        """Close the file of `key`. It does not wait for the lock: a garbage collection calls it."""
        self._forgotten.append(key)
        if self._lock.acquire(blocking=False):
            try:
                unneeded = self._take_unneeded()
            finally:
                self._lock.release()
            for other in unneeded:
                other.close(other.file)

    def after_fork(self) -> None:
        """Replace the locks, which a thread of the parent may hold; open files stay open.

        ArrayRecord cannot open a file in a child once its threads have run in the parent.
        """
        self._lock = threading.Lock()
        self._kept = self._kept.copy()
        for kept in self._kept.values():
            kept.lock, kept.users = threading.Lock(), 0

    def _take_unneeded(self) -> list["_Kept"]:
        """Remove the forgotten files, and the least recently used ones beyond the limit."""
        taken = []
        for _ in range(len(self._forgotten)):
            key = self._forgotten.popleft()
            if key in self._kept and not self._kept[key].users:
                taken.append(self._kept.pop(key))
        excess = len(self._kept) - self._limit
        if excess > 0:
            unused = (key for key, kept in self._kept.items() if not kept.users)
            taken += [self._kept.pop(key) for key in list(itertools.islice(unused, excess))]
        return [kept for kept in taken if kept.file is not None]


class _Kept:
    def __init__(self, close: Callable[[Any], None]):
        self.close, self.lock = close, threading.Lock()
        self.file: Any = None
        self.users = 0


def _limit() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return _MAX_OPEN
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, min(_MAX_OPEN, soft // _SHARE)) if soft > 0 else _MAX_OPEN


OPEN = OpenFiles(_limit())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OPEN.after_fork)


class PositionedFile(io.RawIOBase):
    """Seekable file for reading that keeps its own position; subclasses read at `_place`."""

    def __init__(self, path: str):
        super().__init__()
        self._path, self._place = path, 0

    def _length(self) -> int:
        """Return the length in bytes."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        places = {os.SEEK_SET: 0, os.SEEK_CUR: self._place}
        base = self._length() if whence == os.SEEK_END else places[whence]
        self._place = max(0, base + offset)
        return self._place


class LocalFile(PositionedFile):
    """Local file for reading, which is closed and reopened when too many files are open."""

    def __init__(self, path: str):
        super().__init__(path)
        with self._opened():  # raises the errors of `open`
            pass

    def _length(self) -> int:
        return os.stat(self._path).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        with self._opened() as file:
            file.seek(self._place)
            data = file.read(size)
        self._place += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        with self._opened() as file:
            file.seek(self._place)
            count = file.readinto(buffer)
        self._place += count
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            OPEN.forget((id(self), self._path))

    def _opened(self) -> contextlib.AbstractContextManager[Any]:
        return OPEN.use(
            (id(self), self._path),  # not shared: the position is the file's
            lambda: open(self._path, "rb", buffering=0),
            lambda file: file.close(),
        )
