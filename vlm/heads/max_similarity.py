"""MaxSim scores between sets of vectors, on the host and on the devices of a mesh.

The score of an item is the sum, over the vectors of a query, of the largest cosine with a vector of
the item (ColBERT, arXiv:2004.12832).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from vlm.heads.device_search import search_program, valid_rows

PRODUCT_BYTES = 16 << 20  # of products held at once on the host
DEVICE_BYTES = 64 << 20  # the same on a device
QUERIES, VECTORS = 32, 1024  # searched at once on a device, and the vectors of these

Queries = list[Float[np.ndarray, "_ d"]]


def max_similarity(
    queries: Queries,
    vectors: Any,
    starts: Int[np.ndarray, " bounds"],
    scale: np.ndarray | None = None,
) -> Float[np.ndarray, "q n"]:
    """Compute the MaxSim of each query and item; exact for float32 vectors.

    Args:
        queries: vectors of each query.
        vectors: rows of all items together: an array, or what gives one by a slice.
        starts: first row of each item, and the number of rows.
        scale: a factor for the products of each row, or None.
    """
    z = np.concatenate(queries).astype(np.float32)
    first = np.cumsum([0, *map(len, queries[:-1])])
    tile = max(1, PRODUCT_BYTES // (4 * max(len(z), vectors.shape[1])))
    out = np.empty((len(queries), len(starts) - 1), np.float32)
    low = 0
    while low < len(starts) - 1:
        high = max(low + 1, int(np.searchsorted(starts, starts[low] + tile, "right")) - 1)
        rows = slice(starts[low], starts[high])
        products = z @ np.asarray(vectors[rows], np.float32).T
        if scale is not None:
            products *= scale[rows]
        best = np.maximum.reduceat(products, starts[low:high] - starts[low], axis=1)
        out[:, low:high] = np.add.reduceat(best, first, axis=0)
        low = high
    return out


def best_items(
    scores: Float[np.ndarray, "q n"], k: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return positions and scores of the k best items of each query; ties keep their order."""
    at = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return list(at), list(np.take_along_axis(scores, at, axis=1))


class DeviceMaxSimilarity:
    """Exact MaxSim search on a mesh: items are sharded over all devices, and the best merged.

    Items are padded to the length of the longest one; padding is masked.
    """

    def __init__(self, vectors: np.ndarray, starts: Int[np.ndarray, " bounds"], mesh: Mesh):
        self.mesh, self.count = mesh, len(starts) - 1
        lengths = np.diff(starts).astype(np.int32)
        longest, width = int(lengths.max()), vectors.shape[1]
        shard = -(-self.count // mesh.size)
        per_item = 4 * longest * max(width, VECTORS)
        self._tile = min(shard, max(1, DEVICE_BYTES // per_item))
        self._shard = -(-shard // self._tile) * self._tile
        total = self._shard * mesh.size

        def padded(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(total)
            out = np.zeros((last - first, longest, width), vectors.dtype)
            for item in range(first, min(last, self.count)):
                rows = vectors[starts[item] : starts[item + 1]]
                out[item - first, : len(rows)] = rows
            return out

        over = NamedSharding(mesh, P(tuple(mesh.axis_names)))
        rows = jax.make_array_from_callback((total, longest, width), over, padded)  # pyright: ignore[reportArgumentType]
        lengths = np.pad(lengths, (0, total - self.count))
        self._items = rows, jax.device_put(lengths, over)
        self._known = jax.device_put(np.arange(total) < self.count, over)

    def search(self, queries: Queries, k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return positions and scores of the k best items of each query, as on the host."""
        longest, k = max(map(len, queries)), min(k, self.count)
        longest = 1 << (longest - 1).bit_length()  # few shapes to compile for
        program = search_program(self.mesh, self._shard, self._tile, k, _device_scores)
        everywhere = NamedSharding(self.mesh, P())
        found: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        block = min(QUERIES, max(1, VECTORS // longest))
        for start in range(0, len(queries), block):
            part = queries[start : start + block]
            size = 1 << (len(part) - 1).bit_length()
            z = np.zeros((size, longest, part[0].shape[1]), np.float32)
            real = np.zeros((size, longest), bool)
            for i, query in enumerate(part):
                z[i, : len(query)], real[i, : len(query)] = query, True
            asked = jax.device_put((z, real), everywhere)
            scores, at = jax.device_get(program(asked, self._items, self._known))
            for all_found, rows in zip(found, valid_rows(at, scores, len(part)), strict=True):
                all_found += rows
        return found


def _device_scores(queries, items) -> jax.Array:
    (z, real), (vectors, lengths) = queries, items
    products = jnp.einsum(
        "qtd,nld->qtnl", z, vectors.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    inside = jnp.arange(vectors.shape[1]) < lengths[:, None]  # (n, l)
    best = jnp.where(inside, products, -jnp.inf).max(-1)  # (q, t, n)
    return jnp.where(real[..., None], best, 0).sum(1)
