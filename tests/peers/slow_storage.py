"""Simulated bucket: local files with a slow open and limited bandwidth."""

import time

import fsspec
from fsspec.implementations.local import LocalFileSystem

OPEN_SECONDS, BYTES_PER_SECOND = 0.05, 50e6


class SlowFileSystem(LocalFileSystem):
    """fsspec file system in which `slow:///path` is the local file `/path`."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("slow://"))

    def open(self, path, mode="rb", **options):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Open the file after the delay of a bucket."""
        time.sleep(OPEN_SECONDS)
        return _Slow(open(self._strip_protocol(path), mode, buffering=0))


class _Slow:
    def __init__(self, file):
        self._file = file

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        time.sleep(len(data) / BYTES_PER_SECOND)
        return data

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def register() -> None:
    """Register the file system with fsspec."""
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
