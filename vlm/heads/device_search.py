"""Exact search on a mesh: each device holds its share of the rows, and gives its own k best.

Scores are compiled by XLA. A device walks over its rows in tiles, so that its memory is its share
and one tile of products; then one all-gather brings k answers from every device, and the best of
those are the answers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from vlm.errors import ConfigError

TILE = 1 << 14  # rows multiplied at once on a device


class DeviceSearch:
    """The rows of an index on the devices of a mesh.

    Args:
        blocks: rows (n_i, d) of the index; each device reads its own share of them only.
        mesh: its devices share the rows, whatever the axes are called.
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
        share = -(-self.count // mesh.size)
        self._tile = min(TILE, share)
        self._share = -(-share // self._tile) * self._tile  # rows of a device, the last ones empty
        starts = np.cumsum([0, *map(len, blocks)])
        dtype, width = blocks[0].dtype, blocks[0].shape[1]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(self._share * mesh.size)
            out = np.zeros((last - first, width), dtype)
            for block, at in zip(blocks, starts[:-1], strict=True):
                low, high = max(first, at), min(last, at + len(block))
                if high > low:
                    out[low - first : high - first] = block[low - at : high - at]
            return out

        shape = (self._share * mesh.size, width)
        # The stub says that there may be no index, which there is here.
        over = self._over(P(self._axes))
        self.rows = jax.make_array_from_callback(shape, over, read)  # pyright: ignore[reportArgumentType]

    def search(
        self,
        z_query: Float[np.ndarray, "q d"],
        k: int,
        allowed: Bool[np.ndarray, " n"] | None = None,
        min_score: float = -np.inf,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Positions and scores of the k nearest rows, as `top_k` gives them on the host."""
        mask = np.zeros(self._share * self.mesh.size, bool)
        mask[: self.count] = True if allowed is None else allowed
        k = min(k, self.count)
        asked = 1 << (len(z_query) - 1).bit_length()  # few shapes to compile for
        padded = np.pad(np.asarray(z_query, np.float32), ((0, asked - len(z_query)), (0, 0)))
        scores, positions = jax.device_get(
            self.program(k)(
                jax.device_put(padded, self._over(P())),
                self.rows,
                jax.device_put(mask, self._over(P(self._axes))),
            )
        )
        found = [row > -np.inf for row in scores[: len(z_query)]]
        found = [f & (row >= min_score) for f, row in zip(found, scores, strict=False)]
        return (
            [row[f].astype(np.int64) for row, f in zip(positions, found, strict=False)],
            [row[f] for row, f in zip(scores, found, strict=False)],
        )

    def program(self, k: int):
        """The compiled search for k answers: (queries, rows, mask) to (scores, positions)."""
        on_tpu = self.mesh.devices.flat[0].platform == "tpu"
        return _program(self.mesh, self._share, self._tile, k, self.approximate and on_tpu)

    def _over(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


@functools.lru_cache(maxsize=64)
def _program(mesh: Mesh, share: int, tile: int, k: int, approximate: bool):
    axes = tuple(mesh.axis_names)
    kept = min(k, share)

    def best_of(scores, positions):
        scores, at = jax.lax.top_k(scores, kept)  # the first of equals comes first
        return scores, jnp.take_along_axis(positions, at, axis=1)

    def of_device(queries, rows, mask):
        def step(best, start):
            part = jax.lax.dynamic_slice_in_dim(rows, start, tile)
            known = jax.lax.dynamic_slice_in_dim(mask, start, tile)
            scores = jnp.dot(
                queries, part.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
            )
            scores = jnp.where(known, scores, -jnp.inf)
            at = jnp.broadcast_to(start + jnp.arange(tile), scores.shape)
            if approximate and tile > kept:
                scores, chosen = jax.lax.approx_max_k(scores, kept)
                at = jnp.take_along_axis(at, chosen, axis=1)
            best = [jnp.concatenate(pair, axis=1) for pair in zip(best, (scores, at), strict=True)]
            return best_of(*best), None

        count = len(queries)
        nothing = jnp.full((count, kept), -jnp.inf), jnp.zeros((count, kept), jnp.int32)
        (scores, at), _ = jax.lax.scan(step, nothing, jnp.arange(0, share, tile))
        at += share * jax.lax.axis_index(axes)
        # Scores and positions travel together, so that there is one all-gather.
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
            check_vma=False,  # after the gather all devices hold the same
        )
    )
