"""A stand-in for a bucket: local files whose opening takes long and whose streams are slow."""

import time

import fsspec
from fsspec.implementations.local import LocalFileSystem

OPEN_SECONDS, BYTES_PER_SECOND = 0.05, 50e6


class SlowFileSystem(LocalFileSystem):
    """`slow:///path` is `/path`, by way of `fsspec` like any bucket."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("slow://"))

    def open(self, path, mode="rb", **options):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The file, after the time that a bucket takes."""
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
    """Let `fsspec` know it."""
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
