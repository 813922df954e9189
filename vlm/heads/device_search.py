"""Exact search on a mesh: rows are sharded over the devices, and their top k are merged.

The search is compiled by XLA. Each device scans its shard in tiles, so it holds the shard and one
tile of products. One all-gather then collects the top k of every device, and the best are kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from vlm.errors import ConfigError

TILE = 1 << 14  # rows multiplied at once on a device


def searcher_on(mesh: Mesh | None, approximate: bool) -> Callable[..., "DeviceSearch"] | None:
    """Return what makes a searcher of rows on a mesh; None for None."""
    if mesh is None:
        return None
    return functools.partial(DeviceSearch, mesh=mesh, approximate=approximate)


class DeviceSearch:
    """Searcher over the rows of an index, sharded over the devices of a mesh.

    Args:
        blocks: rows (n_i, d) of the index; each device reads only its shard.
        mesh: the rows are sharded over all of its axes.
        approximate: let a TPU find the best of each tile by `approx_max_k` (Chern et al., 2022,
            arXiv:2206.14286), which may miss a few; other devices stay exact.

    Raises:
        ConfigError: no rows.
    """

    def __init__(self, blocks: list[np.ndarray], mesh: Mesh, approximate: bool = False):
        self.count = sum(map(len, blocks))
        if not self.count:
            raise ConfigError("the index is empty: add items before placing it on devices")
        self.mesh, self.approximate = mesh, approximate
        self._axes = tuple(mesh.axis_names)
        shard = -(-self.count // mesh.size)
        self._tile = min(TILE, shard)
        self._shard = -(-shard // self._tile) * self._tile  # rows per device, padded with zeros
        starts = np.cumsum([0, *map(len, blocks)])
        dtype, width = blocks[0].dtype, blocks[0].shape[1]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(self._shard * mesh.size)
            out = np.zeros((last - first, width), dtype)
            for block, at in zip(blocks, starts[:-1], strict=True):
                low, high = max(first, at), min(last, at + len(block))
                if high > low:
                    out[low - first : high - first] = block[low - at : high - at]
            return out

        shape = (self._shard * mesh.size, width)
        # The type stub allows an index of None, which does not occur here.
        over = self._over(P(self._axes))
        self.rows = jax.make_array_from_callback(shape, over, read)  # pyright: ignore[reportArgumentType]

    def search(
        self,
        z_query: Float[np.ndarray, "q d"],
        k: int,
        allowed: Bool[np.ndarray, " n"] | None = None,
        min_score: float = -np.inf,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return positions and scores of the k nearest rows, as `top_k` does on the host."""
        mask = np.zeros(self._shard * self.mesh.size, bool)
        mask[: self.count] = True if allowed is None else allowed
        k = min(k, self.count)
        size = 1 << (len(z_query) - 1).bit_length()  # few shapes to compile for
        padded = np.pad(np.asarray(z_query, np.float32), ((0, size - len(z_query)), (0, 0)))
        scores, positions = jax.device_get(
            self.program(k)(
                jax.device_put(padded, self._over(P())),
                self.rows,
                jax.device_put(mask, self._over(P(self._axes))),
            )
        )
        return valid_rows(positions, scores, len(z_query), min_score)

    def program(self, k: int):
        """Return the compiled search: (queries, rows, mask) to k (scores, positions) per query."""
        on_tpu = self.mesh.devices.flat[0].platform == "tpu"
        return search_program(
            self.mesh, self._shard, self._tile, k, _products, self.approximate and on_tpu
        )

    def _over(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def valid_rows(
    positions: np.ndarray, scores: np.ndarray, count: int, min_score: float = -np.inf
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the positions and scores of the first `count` queries that are answers."""
    valid = [(row > -np.inf) & (row >= min_score) for row in scores[:count]]
    return (
        [row[f].astype(np.int64) for row, f in zip(positions, valid, strict=False)],
        [row[f] for row, f in zip(scores, valid, strict=False)],
    )


def _products(queries: Float[jax.Array, "q d"], rows: Float[jax.Array, "n d"]) -> jax.Array:
    return jnp.dot(queries, rows.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=64)
def search_program(
    mesh: Mesh, shard: int, tile: int, k: int, score: Callable[..., Any], approximate: bool = False
):
    """Compile a search for the k rows with the best scores, over rows sharded on a mesh.

    `score(queries, rows)` gives (q, n) scores of a tile. Queries and rows are arrays, or tuples of
    arrays with equal first dimensions.
    """
    axes = tuple(mesh.axis_names)
    kept = min(k, shard)

    def best_of(scores, positions):
        scores, at = jax.lax.top_k(scores, kept)  # ties keep the order of the rows
        return scores, jnp.take_along_axis(positions, at, axis=1)

    def of_device(queries, rows, mask):
        def step(best, start):
            part, known = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, start, tile), (rows, mask)
            )
            scores = jnp.where(known, score(queries, part), -jnp.inf)
            at = jnp.broadcast_to(start + jnp.arange(tile), scores.shape)
            if approximate and tile > kept:
                scores, chosen = jax.lax.approx_max_k(scores, kept)
                at = jnp.take_along_axis(at, chosen, axis=1)
            best = [jnp.concatenate(pair, axis=1) for pair in zip(best, (scores, at), strict=True)]
            return best_of(*best), None

        count = len(jax.tree.leaves(queries)[0])
        nothing = jnp.full((count, kept), -jnp.inf), jnp.zeros((count, kept), jnp.int32)
        (scores, at), _ = jax.lax.scan(step, nothing, jnp.arange(0, shard, tile))
        at += shard * jax.lax.axis_index(axes)
        # Scores and positions are packed together: one all-gather instead of two.
        bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
        bits, at = jax.lax.all_gather(jnp.stack([bits, at]), axes, axis=2, tiled=True)
        scores = jax.lax.bitcast_convert_type(bits, jnp.float32)
        scores, chosen = jax.lax.top_k(scores, min(k, scores.shape[1]))
        return scores, jnp.take_along_axis(at, chosen, axis=1)

    return jax.jit(
        jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(P(), P(axes), P(axes)),
            out_specs=P(),
            check_vma=False,  # after the all-gather the outputs are replicated
        )
    )
