"""Run an encoder over batches: padded, sharded, and fetched one batch behind."""

import collections
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from vlm.errors import ConfigError
from vlm.nn.naflex import Patches
from vlm.sharding import place_padded

_used = False  # whether this process, or one that it was forked from, has used JAX
_forked = False


def use_jax() -> None:
    """Note that this process uses JAX.

    Raises:
        ConfigError: it was forked from a process that did. A fork lacks the threads of JAX, so the
            first computation would never end.
    """
    global _used
    if _forked:
        raise ConfigError(
            "this process was forked from one that has a model, and JAX would hang here: start "
            "processes with multiprocessing.get_context('spawn'), or load the model after the fork"
        )
    _used = True


def _after_fork() -> None:
    global _forked
    _forked = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_batches(
    program: Callable[[Any], Any],
    batches: Iterable[Any],
    size: int,
    embed_dim: int,
    mesh: Mesh | None,
    finished: Callable[[int], None] = lambda count: None,
) -> Float32[np.ndarray, "n d"]:
    """Run all batches; the results of one are fetched while the next one is computed.

    `finished` is called with the number of rows of each batch that was fetched.
    """
    use_jax()
    parts: list[Any] = [np.zeros((0, embed_dim), np.float32)]
    running: collections.deque = collections.deque()

    def fetch() -> None:
        z, count = running.popleft()
        parts.append(np.asarray(z)[:count])
        finished(count)

    for rows in batches:
        count = len(rows.mask if isinstance(rows, Patches) else rows)
        running.append((program(place_padded(rows, count, size, mesh)), count))
        if len(running) > 1:
            fetch()
    while running:
        fetch()
    return np.concatenate(parts)
