"""Exact top-k search on the host, in one pass over the rows."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from vlm.heads import pruned_search
from vlm.heads.pruned_search import Bounds, Pruner

PRODUCT_BYTES = 16 << 20  # of scores held at once; float32 rows are not copied
WIDENED_BYTES = 1 << 20  # of rows widened to float32 at once, per query, up to 32 of them
FIRST_ROWS = 1 << 14  # of the first tile: later most rows fall below the k-th best so far
SPARSE = 0.1  # below this fraction of allowed rows, only those are multiplied
SMALL_PRODUCT = 1 << 20  # multiplications above which OpenBLAS has one summation order


@runtime_checkable
class Searcher(Protocol):
    """Interface of alternative searchers over the same rows: devices of a mesh, or faiss."""

    def search(
        self, z_query: np.ndarray, k: int, allowed: np.ndarray | None, min_score: float
    ) -> tuple[list[np.ndarray], list[np.ndarray]]: ...


def top_k(
    z_query: Float[np.ndarray, "q d"],
    blocks: Iterable[np.ndarray],
    k: int,
    *,
    allowed: Bool[np.ndarray, " n"] | None = None,
    min_score: float = -np.inf,
    scales: Iterable[np.ndarray | None] | None = None,
    bounds: Iterable[Bounds | None] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return positions and scores of the k largest products per query, over blocks of rows.

    Exact; equal scores keep the order of the rows. Memory is independent of the size of the index:
    the scores of one tile, and its rows if they are narrower than float32.

    Args:
        z_query: the queries.
        blocks: rows (n_i, d), float32 or narrower; of all blocks together there are n.
        k: answers per query; there are fewer if fewer rows qualify.
        allowed: the rows that may be answers; all by default.
        min_score: the least score of an answer.
        scales: for each block, factors of its rows' products, or None.
        bounds: for each block, pruning bounds, or None; not with `scales`. They change the time,
            not the results.
    """
    count = len(z_query)
    best_at = [np.zeros(0, np.int64)] * count
    best = [np.zeros(0, np.float32)] * count
    # The score that a new row must exceed.
    floor = np.full(count, np.nextafter(np.float32(min_score), np.float32(-np.inf)), np.float32)
    scale_of = iter(scales) if scales is not None else itertools.repeat(None)
    bounds_of = iter(bounds) if bounds is not None else itertools.repeat(None)
    pruner = _AdaptivePruner(z_query)
    start = 0
    for block in blocks:
        factors, bound = next(scale_of), next(bounds_of)
        step = _tile_rows(block, count) if bound is None else pruned_search.TILE
        first = min(FIRST_ROWS, step) if start == 0 and bound is None else step
        for offset, end in itertools.pairwise((0, *range(first, len(block) + step, step))):
            rows = slice(offset, end)
            if not len(block[rows]):
                break
            here = None if allowed is None else allowed[start + offset :][: len(block[rows])]
            if here is not None and not here.any():
                continue
            if bound is not None:
                here = pruner.remaining(bound, offset // step, floor, here, len(block[rows]))
                if here is not None and not here.any():
                    continue
            picked = None
            if here is not None and here.mean() < SPARSE:
                picked = np.flatnonzero(here)
                products = _products_of(z_query, block[rows], picked)
            else:
                products = z_query @ np.asarray(block[rows], np.float32).T
            if factors is not None:
                products *= factors[rows] if picked is None else factors[rows][picked]
            if here is not None and picked is None:
                products[:, ~here] = -np.inf
            for q in np.flatnonzero(products.max(axis=1) > floor):
                row = products[q]
                new = np.flatnonzero(row > floor[q])
                if len(new) > k:  # partition first: the k-th largest and its ties
                    new = new[row[new] >= np.partition(row[new], -k)[-k]]
                scores = np.concatenate([best[q], row[new]])
                order = np.argsort(-scores, kind="stable")[:k]
                best[q] = scores[order]
                at = (new if picked is None else picked[new]) + start + offset
                best_at[q] = np.concatenate([best_at[q], at])[order]
                if len(order) == k:
                    floor[q] = best[q][-1]
        start += len(block)
    return best_at, best


class _AdaptivePruner:
    """Prunes rows by upper bound; backs off exponentially when pruning is ineffective."""

    def __init__(self, z_query: np.ndarray):
        self._z, self._pruner = z_query, None
        self._skip = self._next_skip = 0

    def remaining(
        self, bounds: Bounds, tile: int, floor: np.ndarray, allowed: np.ndarray | None, rows: int
    ) -> np.ndarray | None:
        """Mask of the allowed rows of a tile to multiply; `allowed` while backing off."""
        if allowed is not None and allowed.mean() < SPARSE:
            return allowed
        if self._skip or not np.isfinite(floor).all():
            self._skip = max(0, self._skip - 1)
            return allowed
        self._pruner = self._pruner or Pruner(self._z)
        surviving = self._pruner.surviving(bounds, tile, floor)[:rows]
        if surviving.mean() >= SPARSE:
            self._next_skip = 2 * self._next_skip + 1
            self._skip = self._next_skip
            return allowed
        self._next_skip = 0
        return surviving if allowed is None else surviving & allowed


def _products_of(z_query: np.ndarray, rows: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Compute products with some of the rows, bit-identical to multiplying all of them.

    OpenBLAS uses another summation order for small matrices and for remainders of few rows.
    """
    least = 1 if len(z_query) == 1 else SMALL_PRODUCT // (len(z_query) * rows.shape[1])
    count = max(len(picked), min(least, len(rows)))
    padded = np.resize(picked, -(-count // 64) * 64)
    return (z_query @ np.asarray(rows[padded], np.float32).T)[:, : len(picked)]


def _tile_rows(block: np.ndarray, queries: int) -> int:
    """Return the number of rows of a block that are multiplied at once."""
    rows = PRODUCT_BYTES // (4 * queries)
    if block.dtype != np.float32:
        rows = min(rows, WIDENED_BYTES * min(queries, 32) // (4 * block.shape[1]))
    return max(1, rows)


def rescored(
    z_query: Float[np.ndarray, " d"],
    blocks: list[np.ndarray],
    positions: np.ndarray,
    k: int,
    min_score: float = -np.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best rows at `positions` by exact products; ties keep the order of the rows."""
    positions = np.sort(positions)
    starts = np.cumsum([0, *map(len, blocks)])
    scores = np.empty(len(positions), np.float32)
    for block, first, last in zip(blocks, starts[:-1], starts[1:], strict=True):
        low, high = np.searchsorted(positions, [first, last])
        if high > low:
            rows = np.asarray(block[positions[low:high] - first], np.float32)
            scores[low:high] = rows @ z_query
    order = np.argsort(-scores, kind="stable")[:k]
    order = order[scores[order] >= min_score]
    return positions[order], scores[order]


def recall_at_k(
    z_query: Float[np.ndarray, "q d"],
    blocks: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    exact: Float[np.ndarray, "q k"],
) -> float:
    """Compute the fraction of the k nearest rows that a search found; any row of a tie counts.

    Args:
        z_query: the queries.
        blocks: the rows, in blocks.
        found: for each query the positions that the search returned.
        exact: for each query the scores of its k nearest rows, best first.
    """
    starts = np.cumsum([0, *map(len, blocks)])
    hits = 0
    for z, positions, scores in zip(z_query, found, exact, strict=True):
        own = np.searchsorted(starts, positions, "right") - 1
        rows = [blocks[b][p - starts[b]] for b, p in zip(own, positions, strict=True)]
        least = scores[-1] - 1e-6
        right = (np.asarray(rows, np.float32).reshape(-1, len(z)) @ z >= least).sum()
        hits += min(int(right), len(scores))
    return hits / exact.size
