"""Interleaved benchmarks of two processes, so that both see the same machine load.

While one process runs, the other and its workers are stopped, so that no queue fills up meanwhile.
"""

import atexit
import contextlib
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vlm.cli.runtime import MALLOC  # `vlm train` sets it for itself


class Peer:
    """Child process that runs `script --as name` and waits for requests."""

    def __init__(self, script: str, name: str, *options: str):
        self.name, pipe = name, subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, script, "--as", name, *options],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=os.environ | (MALLOC if name.startswith("ours") else {}),
            process_group=0,
        )
        atexit.register(self.stop)

    def take(self, request: str) -> tuple[float, ...]:
        """Send a request and wait for the numbers in the answer."""
        os.killpg(self.process.pid, signal.SIGCONT)
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(f"{request}\n")
        requests.flush()
        for line in answers:
            if line.startswith("answer "):
                os.killpg(self.process.pid, signal.SIGSTOP)
                return tuple(map(float, line.split()[1:]))
        raise RuntimeError(f"{self.name} stopped; its error is above")

    def cpu_seconds(self) -> float:
        """User and system time of the process and its workers so far (Linux)."""
        ticks = 0
        for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = file.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    ticks += sum(map(int, fields[11:15]))  # with children that have ended
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def requests() -> Iterator[str]:
    """Read requests of the parent process until it closes the pipe."""
    for line in sys.stdin:
        yield line.strip()


def answer(*numbers: float) -> None:
    """Send numbers to the parent process."""
    sys.stdout.write(" ".join(["answer", *map(str, numbers)]) + "\n")
    sys.stdout.flush()


def time_of(function) -> float:
    """Measure the seconds that `function` takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def best_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Call functions of one process in turns; return the shortest time of each, in seconds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], time_of(run))
    return best


def compare_encoders(
    name: str, runs: dict[str, Callable[[], Any]], batch: int, rounds: int
) -> None:
    """Print the images per second of two functions of one process, and how far they are apart."""
    ours, theirs = runs
    results = [np.asarray(run()) for run in runs.values()]
    rates = {which: batch / seconds for which, seconds in best_times(runs, rounds).items()}
    print(
        f"{name:18} batch {batch}: {ours} {rates[ours]:.2f} images/s, {theirs} "
        f"{rates[theirs]:.2f}, ratio {rates[ours] / rates[theirs]:.2f}, apart by "
        f"{np.abs(results[0] - results[1]).max():.1e}",
        flush=True,
    )


def compare(peers: list[Peer], requests: list[str], rounds: int) -> None:
    """Run both peers interleaved; print the medians of the first number and their ratio."""
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
