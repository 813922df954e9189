"""How the benches measure: the best of interleaved rounds, beside what the machine can do."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp


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
    side = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((side, side), dtype)
    run = jax.jit(jnp.matmul)
    return lambda: [run(matrix, matrix) for _ in range(8)], 8 * 2 * side**3


def peak_bytes(device: jax.Device) -> int | None:
    """The most bytes that were in use on a device so far, where it counts them."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")


@contextlib.contextmanager
def traced(folder: str | None) -> Iterator[None]:
    """A device trace of what happens inside, into `folder`; nothing without one."""
    if folder is None:
        yield
        return
    with jax.profiler.trace(folder):
        yield
