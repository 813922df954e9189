"""Run an encoder over batches: padded, sharded, and fetched one batch behind."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from vlm.nn.naflex import Patches
from vlm.sharding import place_padded


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
