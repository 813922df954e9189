"""Timing of interleaved rounds, GEMM throughput and peak memory."""

import contextlib
import ctypes
import gc
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def matrix_side(platform: str) -> int:
    """Side of the square matrices for measuring GEMM throughput."""
    return 2048 if platform == "cpu" else 8192


def times(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of `rounds` interleaved calls of each function, after one that compiles it."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def best_times(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Best seconds of `rounds` interleaved calls of each function."""
    return {name: min(seconds) for name, seconds in times(runs, rounds).items()}


def product(dtype: str, devices: Sequence[Any]) -> tuple[Callable[[], Any], float]:
    """Function that multiplies large square matrices on all devices, and its total FLOPs."""
    on_cpu = devices[0].platform == "cpu"
    side = matrix_side(devices[0].platform)
    repeats = max(1, 8 // len(devices)) if on_cpu else 16  # the devices of a CPU share its cores
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    matrices = jax.device_put(jnp.ones((len(devices), side, side), dtype), sharding)
    run = jax.jit(lambda m: m @ m)
    return lambda: [run(matrices) for _ in range(repeats)], repeats * 2 * len(devices) * side**3


def peak_bytes(device: Any) -> int | None:
    """Peak bytes in use on a device so far; None if the device does not count them."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def resident_peak(run: Callable[[], Any]) -> int | None:
    """Peak resident bytes of the process while `run` runs, above those before (Linux only).

    CPU devices have no memory statistics. A first call allocates what stays: code and threads.
    `run` must not keep references to what it allocates.
    """
    process = pathlib.Path("/proc/self")
    if not sys.platform.startswith("linux") or not (process / "clear_refs").exists():
        return None
    run()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # musl has no such call
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    before = _status("VmRSS")
    (process / "clear_refs").write_text("5")  # reset the high-water mark
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
