"""Decode images in worker processes, which are killed when a file takes too long."""

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Literal

import numpy as np

from vlm.errors import DataError
from vlm.inputs.decoding_limits import TooLargeError
from vlm.inputs.preprocess import Preprocess

Work = Literal["pixels", "picture", "thumbnail"]
START_SECONDS = 60.0  # for a worker to import its modules
EXTRA_BYTES = 96 << 20  # beyond the decoded image: conversion in strips, copies of the file
_KEPT_BYTES = 1 << 20  # of shared memory that a worker keeps between images


def decoder_count(preprocess: Preprocess) -> int:
    """Return the default number of workers: one for each core, within half of the memory."""
    return max(1, min(os.cpu_count() or 1, _memory() // 2 // _worker_bytes(preprocess)))


def _worker_bytes(preprocess: Preprocess) -> int:
    """Return the memory that a worker may allocate."""
    assert preprocess.max_bytes is not None  # of a server
    return preprocess.max_bytes + EXTRA_BYTES


def _memory() -> int:
    """Return the bytes of memory of this machine, or of its container."""
    found = []
    with contextlib.suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        with contextlib.suppress(ValueError, OSError), open(f"/sys/fs/cgroup/{limit}") as file:
            found.append(int(file.read()))
    return min(found, default=8 << 30)


class Stopped(DataError):
    """A worker that was killed while it decoded an image, or that crashed."""


class Worker:
    """One decoding process; calls come from one thread at a time.

    Args:
        preprocess: what makes the pixels, with the limits on an image.
    """

    def __init__(self, preprocess: Preprocess):
        settings = {
            **dataclasses.asdict(preprocess.config),
            "max_pixels": preprocess.max_pixels,
            "max_bytes": preprocess.max_bytes,
            "memory": _worker_bytes(preprocess),
        }
        self._shared = _shared_file()
        # The modules of this process: the package may come from a folder that PYTHONPATH lacks.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from vlm.serving.decode_worker import main; "
            f"main({settings!r}, {self._shared})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._shared,),
            start_new_session=True,  # Ctrl-C stops the server, which finishes its requests first
        )
        self._ready = False

    @property
    def ended(self) -> bool:
        """Whether the process has ended, for example killed by the system for lack of memory."""
        return self._process.poll() is not None

    def run(self, kind: Work, data: bytes, name: str, size: int, seconds: float) -> np.ndarray:
        """Decode an image.

        Args:
            kind: "pixels" of the model, an RGB "picture" or a WebP "thumbnail".
            data: the image file.
            name: of the image in error messages.
            size: maximum side of a picture or thumbnail.
            seconds: after which the process is killed.

        Raises:
            Stopped: the process was killed, or it crashed; it cannot be used again.
            DataError: the image is damaged, or over a limit.
        """
        deadline = time.monotonic() + seconds
        if not self._ready:
            self._reply(name, time.monotonic() + START_SECONDS)
            self._ready = True
        _write(self._shared, data)
        line = json.dumps([kind, len(data), name, size]).encode() + b"\n"
        try:
            os.write(self._process.stdin.fileno(), line)  # pyright: ignore[reportOptionalMemberAccess]
        except BrokenPipeError:
            raise Stopped(f"{name} cannot be decoded, since the decoder ended: retry") from None
        outcome, value = self._reply(name, deadline)
        if outcome == "too_large":
            raise TooLargeError(name, value, "send a smaller one")
        if outcome == "bad":
            raise DataError(value)
        pixels = np.empty(value, np.uint8)
        os.preadv(self._shared, [pixels.reshape(-1).data], 0)
        if max(len(data), pixels.nbytes) > _KEPT_BYTES:
            os.ftruncate(self._shared, 0)
        return pixels

    def _reply(self, name: str, deadline: float) -> Any:
        stdout: Any = self._process.stdout
        text = b""
        while not text.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise Stopped(f"{name} takes too long to decode: remove or replace it")
            if not (part := os.read(stdout.fileno(), 1 << 16)):
                slow = self._process.wait() == -signal.SIGXCPU
                reason = "takes too long to decode" if slow else "crashes the decoder"
                raise Stopped(f"{name} {reason}: remove or replace it")
            text += part
        return json.loads(text)

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        os.close(self._shared)


class Decoders:
    """A fixed number of worker processes, each replaced when it was killed or has crashed.

    Args:
        preprocess: what makes the pixels, with the limits on an image.
        count: of processes.
        seconds: after which a process is killed; besides, it has a limit on processor time.
    """

    def __init__(self, preprocess: Preprocess, count: int, seconds: float):
        self._preprocess, self._seconds = preprocess, seconds
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)  # started when needed
        self._lock, self._all, self._open = threading.Lock(), set[Worker](), True
        self._count = count

    def start(self) -> None:
        """Start all processes, without waiting for them."""
        taken = [self._idle.get() for _ in range(self._count)]
        for worker in taken:
            self._idle.put(worker or self._started())

    def run(self, kind: Work, data: bytes, name: str, size: int = 0) -> np.ndarray:
        """Decode an image in one of the processes: see `Worker.run`.

        Raises:
            DataError: the image is damaged, over a limit, or its process was killed.
        """
        worker = self._idle.get()
        try:
            if worker is not None and worker.ended:
                self._remove(worker)
                worker = None
            if worker is None:
                worker = self._started()
            return worker.run(kind, data, name, size, self._seconds)
        except DataError as error:
            if isinstance(error, Stopped) and worker is not None:
                self._remove(worker)
                worker = None
                worker = self._started()  # now, so that the next image need not wait for it
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill all processes."""
        with self._lock:
            self._open = False
            workers, self._all = self._all, set()
        for worker in workers:
            worker.close()

    def _started(self) -> Worker:
        with self._lock:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            worker = Worker(self._preprocess)
            self._all.add(worker)
            return worker

    def _remove(self, worker: Worker) -> None:
        with self._lock:
            if worker not in self._all:  # closed already
                return
            self._all.remove(worker)
        worker.close()


def _shared_file() -> int:
    """Return the descriptor of a file in memory, or of one without a name where there is none."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vlm-image")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(shared: int, data: bytes) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.pwrite(shared, view[at:], at)
