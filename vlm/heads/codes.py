"""Quantized codes of embeddings, which a search scans to find candidates for exact scoring.

"int8" stores one byte per dimension and one scale per row. "binary" stores the sign of each
dimension, after subtracting the mean of the first rows, and compares codes by Hamming distance.
Candidates are then scored with the embeddings themselves, which may stay on disk.
"""

import functools
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from vlm.errors import check_choice
from vlm.heads.top_k import top_k

Coding = Literal["int8", "binary"]

# Candidates per requested answer, and their minimum.
CANDIDATES: dict[str, int] = {"int8": 4, "binary": 40}
LEAST = 100
SCANNED = 1 << 16  # rows of bits compared in one call; the last ones are padded to this


class Codes:
    """Codes of a block of rows.

    Attributes:
        values: (n, d) int8, or (n, ceil(d / 32)) uint32 of signs.
        scale: (n,) float32 for int8, where a row is about values * scale; None for binary.
    """

    def __init__(self, values: np.ndarray, scale: np.ndarray | None = None):
        self.values, self.scale = values, scale

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


def encode(rows: Float[np.ndarray, "n d"], coding: Coding, centre: np.ndarray) -> Codes:
    """Encode rows; for binary codes `centre` (d,) is subtracted first."""
    check_choice("coding", coding, get_args(Coding))
    rows = np.asarray(rows, np.float32)
    if coding == "int8":
        scale = np.abs(rows).max(axis=1) / 127
        return Codes(np.rint(rows / scale[:, None]).astype(np.int8), scale.astype(np.float32))
    return Codes(signs(rows, centre))


def signs(rows: Float[np.ndarray, "n d"], centre: Float[np.ndarray, " d"]) -> np.ndarray:
    """Pack the sign bits of rows - centre into uint32, padded with zeros."""
    packed = np.packbits(rows > centre, axis=1)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return np.ascontiguousarray(packed).view(np.uint32)


def candidates(
    z_query: Float[np.ndarray, "q d"],
    blocks: list[Codes],
    count: int,
    coding: Coding,
    centre: Float[np.ndarray, " d"],
    allowed: Bool[np.ndarray, " n"] | None = None,
) -> list[np.ndarray]:
    """Return for each query the positions of the `count` rows with the best codes.

    Rows that tie with the last of them, as binary codes often do, are all returned.
    """
    check_choice("coding", coding, get_args(Coding))
    if coding == "int8":
        values, scales = [b.values for b in blocks], [b.scale for b in blocks]
        return top_k(z_query, values, count, allowed=allowed, scales=scales)[0]
    bits = signs(z_query, centre)
    differing = np.concatenate([_differing(block.values, bits) for block in blocks], axis=1)
    found = []
    for row in differing:
        if allowed is not None:
            row = np.where(allowed, row, np.iinfo(np.uint16).max)
        sizes = np.cumsum(np.bincount(row))
        limit = int(np.searchsorted(sizes, count))
        at = np.flatnonzero(row <= limit)
        found.append(at if allowed is None else at[allowed[at]])
    return found


def _differing(codes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Hamming distances (q, n), uint16, of each query and row."""
    out = np.empty((len(queries), len(codes)), np.uint16)
    program = _bit_counter()
    for start in range(0, len(codes), SCANNED):
        tile = codes[start : start + SCANNED]
        rows = len(tile)
        if rows < SCANNED:
            size = min(SCANNED, 1 << (rows - 1).bit_length())
            tile = np.pad(tile, ((0, size - rows), (0, 0)))
        for q, query in enumerate(queries):
            out[q, start : start + rows] = np.asarray(program(tile, query))[:rows]
    return out


@functools.cache
def _bit_counter():
    # XLA uses vector instructions for popcount: several times as fast as NumPy.
    import jax
    import jax.numpy as jnp

    cpu = jax.local_devices(backend="cpu")[0]

    @jax.jit
    def count(codes, query):
        return jax.lax.population_count(codes ^ query).astype(jnp.uint16).sum(1, dtype=jnp.uint16)

    def on_host(codes, query):
        with jax.default_device(cpu):
            return count(codes, query)

    return on_host
