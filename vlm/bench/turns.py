"""Two processes that work in turn, so that both meet the same machine at the same time.

Out of its turn a process and all its workers stand still: no queue fills up at the other's cost.
"""

import atexit
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

# `vlm train` sets this for itself: large buffers in huge pages.
OURS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Peer:
    """`script --as name`, waiting for its turn in a process of its own.

    With `module` the script is the name of one.
    """

    def __init__(self, script: str, name: str, *options: str, module: bool = False):
        self.name, pipe = name, subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, *(["-m"] if module else []), script, "--as", name, *options],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=os.environ | (OURS if name.startswith("ours") else {}),
            process_group=0,
        )
        atexit.register(self.stop)

    def take(self, request: str) -> tuple[float, ...]:
        """Send a request and wait for the numbers of its answer."""
        os.killpg(self.process.pid, signal.SIGCONT)
        told, answers = self.process.stdin, self.process.stdout
        assert told is not None
        assert answers is not None
        told.write(f"{request}\n")
        told.flush()
        for line in answers:
            if line.startswith("answer "):
                os.killpg(self.process.pid, signal.SIGSTOP)
                return tuple(map(float, line.split()[1:]))
        raise RuntimeError(f"{self.name} stopped; its error is above")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def requests() -> Iterator[str]:
    """What the other side asks for, until it stops."""
    for line in sys.stdin:
        yield line.strip()


def answer(*numbers: float) -> None:
    """Say the numbers that were asked for."""
    sys.stdout.write(" ".join(["answer", *map(str, numbers)]) + "\n")
    sys.stdout.flush()


def time_of(function) -> float:
    """Seconds that `function` takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(peers: list[Peer], requests: list[str], rounds: int) -> None:
    """Ask ours and theirs in turn, and print the medians of the first number and their ratio."""
    for request in requests:
        for peer in peers:
            peer.take(request)  # compile, and warm the caches
        values = {peer.name: [] for peer in peers}
        for _ in range(rounds):
            for peer in peers:
                values[peer.name].append(peer.take(request)[0])
        ours, theirs = (statistics.median(values[name]) for name in ("ours", "theirs"))
        sys.stdout.write(
            f"{request:12} vlm {ours:8.3f}  peer {theirs:8.3f} per second: {ours / theirs:.2f}x\n"
        )
        sys.stdout.flush()
