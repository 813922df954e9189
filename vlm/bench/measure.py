"""How the benches measure: the best of interleaved rounds, beside what the machine can do."""

import contextlib
import ctypes
import gc
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def matrix_side(platform: str) -> int:
    """Of the square matrices whose product shows how fast a device multiplies."""
    return 2048 if platform == "cpu" else 8192


def best_times(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """The best seconds of `rounds` calls of each, in turns so that all meet the same load."""
    best = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        best[name] = float("inf")
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def product(dtype: str) -> tuple[Callable[[], Any], float]:
    """Products of large square matrices on one device, and their operations."""
    side = matrix_side(jax.default_backend())
    matrix = jnp.ones((side, side), dtype)
    run = jax.jit(jnp.matmul)
    return lambda: [run(matrix, matrix) for _ in range(8)], 8 * 2 * side**3


def peak_bytes(device: Any) -> int | None:
    """The most bytes that were in use on a device so far, where it counts them."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def resident_peak(run: Callable[[], Any]) -> int | None:
    """The most bytes that `run` takes over what the process holds without it; None but on Linux.

    A CPU device counts nothing itself, so this is the resident memory of the process. A first call
    brings what stays: code, threads and their stacks. What `run` holds must be its own.
    """
    process = pathlib.Path("/proc/self")
    if not sys.platform.startswith("linux") or not (process / "clear_refs").exists():
        return None
    run()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # musl has no such call
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    before = _status("VmRSS")
    (process / "clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def traced(folder: str | None) -> Iterator[None]:
    """A device trace of what happens inside, into `folder`; nothing without one."""
    if folder is None:
        yield
        return
    with jax.profiler.trace(folder):
        yield
