"""Opening of Parquet files; the footers of remote ones are kept in memory.

A remote file is opened for each part that is read. With its length and footer known, that needs no
request but those of the part. `check_footer` notices a file that was written again.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow.parquet

from vlm.data.storage import RemoteInfo, open_file, remote_info, retry
from vlm.paths import is_remote

_MEMORY = 64 << 20  # bytes of footers, as stored in the files


class _Footer(NamedTuple):
    metadata: Any
    info: RemoteInfo


class _Footers:
    """Footers of the files that were opened last; thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, _Footer] = collections.OrderedDict()
        self._bytes = 0

    def get(self, name: str) -> _Footer | None:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def put(self, name: str, footer: _Footer) -> None:
        with self._lock:
            self._drop(name)
            self._kept[name] = footer
            self._bytes += footer.metadata.serialized_size
            while self._bytes > _MEMORY:
                self._drop(next(iter(self._kept)))

    def drop(self, name: str) -> None:
        with self._lock:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if (footer := self._kept.pop(name, None)) is not None:
            self._bytes -= footer.metadata.serialized_size


_footers = _Footers()


def _after_fork() -> None:
    global _footers
    _footers = _Footers()  # a thread of the parent may hold the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_footer(name: str) -> None:
    """Forget the footer of a file that has changed since it was read."""
    known = _footers.get(name)
    if known is not None and known.info != remote_info(name):
        _footers.drop(name)


@contextlib.contextmanager
def open_parquet(name: str, **options: Any) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a local or remote Parquet file; the errors are those of Arrow, and OSError."""
    if not is_remote(name):
        with open_file(name) as f:
            yield pyarrow.parquet.ParquetFile(f, **options)
        return
    known = _footers.get(name)
    if known is not None:
        options["metadata"] = known.metadata
    info = known.info if known else remote_info(name)
    with retry(lambda: open_file(name, info)) as f:
        file = pyarrow.parquet.ParquetFile(f, **options)
        if known is None:
            _footers.put(name, _Footer(file.metadata, info))
        yield file
