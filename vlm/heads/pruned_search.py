"""Pruned exact search: upper bounds of scores from int8 codes rule out most rows.

A row is r = m + s c + e, with a centre m per block, a scale s, int8 codes c, and a residual e, of
which only the length is stored. A query is quantized too: q = t b + f. So

    q . r  =  q . m  +  t s (b . c)  +  f . s c  +  q . e
          <=  q . m  +  t s (b . c)  +  |f| |s c|  +  |q| |e|       (Cauchy and Schwarz)

where b . c is exact in int32, and reads a quarter of the bytes of float32. A row whose bound does
not exceed the k-th best score so far cannot be an answer; the remaining rows are multiplied in
float32. The search stays exact: the bound includes a margin for float32 rounding.

XLA multiplies int8 matrices quickly on the CPU, in every version of JAX that vlm supports. For 1,
8, 64 and 256 queries of width 512, bounds took 0.9, 0.2, 0.4 and 0.75 of the CPU time of the
float32 products of the same rows (JAX 0.10.0 and 0.10.2, AVX-512). So an index always uses them.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float

TILE = 1 << 15  # rows bounded in one call; the last ones of a block are padded to a power of two
LEAST_ROWS = 1 << 13  # smallest block that gets bounds
LEAST_QUERIES = 16  # queries per call: fewer take as long, so they are padded
ENCODED = 1 << 8  # rows encoded at once, which fit the cache of a core


class Bounds:
    """Int8 codes of a block of rows and their residuals' lengths: a quarter of the rows' memory.

    Args:
        rows: (n, d) finite embeddings, float32 or narrower.
    """

    def __init__(self, rows: Float[np.ndarray, "n d"]):
        self.centre = np.asarray(rows[:TILE], np.float32).mean(axis=0)
        self.longest_code = self.longest_error = 0.0  # lengths |s c| and |e|
        self.tiles = []
        for start in range(0, len(rows), TILE):
            codes, scale, error, length = _encode(rows[start : start + TILE], self.centre)
            self.longest_code = max(self.longest_code, float(length.max()))
            self.longest_error = max(self.longest_error, float(error.max()))
            padding = min(TILE, 1 << (len(codes) - 1).bit_length()) - len(codes)
            padded = [np.pad(part, [(0, padding)]) for part in (scale, error)]
            self.tiles.append(_on_host(np.pad(codes, [(0, padding), (0, 0)]), *padded))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for tile in self.tiles for part in tile)


class Pruner:
    """Prunes the rows whose scores cannot exceed a floor, for a batch of queries.

    Args:
        z_query: the queries, of any length.
    """

    def __init__(self, z_query: Float[np.ndarray, "q d"]):
        self._z = z_query
        self._length = np.linalg.norm(z_query, axis=1)
        self._step = np.maximum(np.abs(z_query).max(axis=1) / 127, 1e-30).astype(np.float32)
        codes = np.rint(z_query / self._step[:, None])
        self._error = np.linalg.norm(z_query - codes * self._step[:, None], axis=1)
        self._padding = max(LEAST_QUERIES, 1 << (len(codes) - 1).bit_length()) - len(codes)
        codes = np.pad(codes.astype(np.int8), ((0, self._padding), (0, 0)))
        (self._codes,) = _on_host(np.ascontiguousarray(codes.T))

    def surviving(
        self, bounds: Bounds, tile: int, floor: Float[np.ndarray, " q"]
    ) -> Bool[np.ndarray, " n"]:
        """Mask of the rows of a tile whose bound exceeds the floor of any query.

        The mask of the last tile of a block includes its padding.
        """
        # Float32 products have up to d rounding errors of |q| |r|, and the bounds a few more.
        rounding = (len(bounds.centre) + 32) * np.finfo(np.float32).eps
        longest = np.linalg.norm(bounds.centre) + bounds.longest_code + bounds.longest_error
        limit = floor - self._z @ bounds.centre - self._error * bounds.longest_code
        limit -= self._length * longest * rounding
        # In units of the query's step, which leaves one factor per row and one per query.
        limit, length = limit / self._step, self._length / self._step
        limit = np.pad(limit, (0, self._padding), constant_values=np.inf).astype(np.float32)
        length = np.pad(length, (0, self._padding)).astype(np.float32)
        return np.asarray(_program()(*bounds.tiles[tile], self._codes, length, limit))


def _encode(rows: np.ndarray, centre: np.ndarray):
    """Return (n, d) codes c, (n,) scales s, and the lengths |e| and |s c|."""
    codes = np.empty(rows.shape, np.int8)
    scale, error, length = np.empty((3, len(rows)), np.float32)
    rest, near = np.empty((2, ENCODED, rows.shape[1]), np.float32)
    for start in range(0, len(rows), ENCODED):
        part = slice(start, start + ENCODED)
        z = np.subtract(rows[part], centre, out=rest[: len(rows[part])])
        coded = np.abs(z, out=near[: len(z)])
        scale[part] = s = np.maximum(coded.max(axis=1) / 127, 1e-30)
        np.divide(z, s[:, None], out=coded)
        codes[part] = np.rint(coded, out=coded)
        coded *= s[:, None]
        length[part] = _lengths(coded)
        z -= coded
        error[part] = _lengths(z)
    return codes, scale, error, length


def _lengths(z: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", z, z))


@functools.cache
def cpu_device():
    """Return JAX's CPU device, or None if JAX has no CPU backend (JAX_PLATFORMS)."""
    import jax

    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _on_host(*arrays: np.ndarray):
    import jax

    return jax.device_put(arrays, cpu_device())


@functools.cache
def _program():
    import jax
    import jax.numpy as jnp

    @jax.jit
    def surviving(codes, scale, error, queries, length, limit):
        products = jnp.dot(codes, queries, preferred_element_type=jnp.int32).astype(jnp.float32)
        return (products * scale[:, None] + error[:, None] * length > limit).any(axis=1)

    return surviving
