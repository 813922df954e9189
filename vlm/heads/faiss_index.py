"""faiss search: approximate indexes, tuned to a recall measured against exact search.

An inverted file ("IVF1024,Flat") scans `nprobe` of its cells, and a graph ("HNSW32") keeps
`ef_search` candidates. faiss's defaults (1 cell, 16 candidates) miss most of the nearest rows, so
the search effort is chosen here by the measured recall.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm.errors import ConfigError
from vlm.heads.retrieval import RetrievalIndex
from vlm.heads.top_k import Searcher, recall_at_k, top_k

RECALL = 0.95  # default target recall
SAMPLE, NEAREST = 256, 10  # queries to measure recall on, and neighbours per query
COSINE = 0.5  # cosine of such a query with the stored row that it is made from
_log = logging.getLogger(__name__)


def faiss_search(
    factory: str = "Flat",
    *,
    nprobe: int | None = None,
    ef_search: int | None = None,
    recall: float = RECALL,
) -> Callable[[list[np.ndarray]], Searcher]:
    """Make a faiss searcher for `RetrievalIndex.search_with`; exact for "Flat".

    The recall of the 10 nearest is measured on 256 queries at a cosine of about 0.5 from stored
    rows, and logged, as a warning if it is below `recall`. `RetrievalIndex.recall` measures it on
    queries of your own.

    Args:
        factory: an index description for `faiss.index_factory`, such as
            "IVF1024,Flat" or "HNSW32".
        nprobe: cells of an inverted file to search. None: the smallest power of two that reaches
            `recall`.
        ef_search: candidates that a graph keeps; likewise.
        recall: the fraction of the exact nearest neighbours to find.

    Raises:
        ConfigError: faiss is not installed, the description is invalid, or the index type does not
            have the option.

    Example:
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures, ids=["red", "green", "blue"])
        >>> index.search_with(vlm.heads.faiss_search("HNSW32"))  # doctest: +SKIP
    """
    _faiss()
    return lambda rows: _FaissSearch(rows, factory, nprobe, ef_search, recall)


def to_faiss(
    index: RetrievalIndex,
    factory: str = "Flat",
    *,
    nprobe: int | None = None,
    ef_search: int | None = None,
    recall: float = RECALL,
) -> Any:
    """Make a faiss inner-product index of the embeddings, numbered in the order of `index.ids`.

    faiss ids are integers: store `index.ids` with it. The options are those of `faiss_search`,
    and are set in the index.

    Raises:
        ConfigError: see `faiss_search`; or the index is empty.

    Example:
        >>> index = vlm.RetrievalIndex(model)
        >>> index.add(pictures, ids=["red", "green", "blue"])
        >>> vlm.heads.to_faiss(index).ntotal  # doctest: +SKIP
        3
    """
    if not len(index):
        raise ConfigError("the index is empty: add items before converting it to faiss")
    searcher = _FaissSearch([index.embeddings()], factory, nprobe, ef_search, recall)
    if searcher.option is not None:
        _faiss().ParameterSpace().set_index_parameter(
            searcher.index, searcher.option, searcher.effort
        )
    return searcher.index


class _FaissSearch:
    """Searcher over a faiss index of rows.

    Attributes:
        option, effort: the search-effort parameter and its value, such as "nprobe" and 8; the
            option is None if the index type has none.
        recall: the fraction of the exact nearest neighbours that it finds.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        factory: str,
        nprobe: int | None,
        ef_search: int | None,
        recall: float,
    ):
        self.index = _build(rows, factory)
        name, most = _effort(self.index)
        given: dict[str | None, int | None] = {"nprobe": nprobe, "efSearch": ef_search}
        for option, value in given.items():
            if value is not None and (option != name or value < 1):
                has = "has no" if option != name else "needs a positive"
                raise ConfigError(f"{factory!r} {has} {option} ({value}): leave it out")
        self.option, self.effort = name, given.get(name) or 1
        queries, exact = _sample(rows)
        while True:
            approximate, _ = self.search(queries, exact.shape[1])
            self.recall = recall_at_k(queries, rows, approximate, exact)
            if self.recall >= recall or self.effort >= most or given.get(name):
                break
            self.effort = min(2 * self.effort, most)
        effort = "" if name is None else f" with {name} {self.effort}"
        _log.log(
            logging.INFO if self.recall >= recall else logging.WARNING,
            "faiss %r%s finds %.1f%% of the %d nearest rows, measured on %d queries",
            factory, effort, 100 * self.recall, exact.shape[1], len(queries),
        )  # fmt: skip

    def search(self, z_query, k, allowed=None, min_score=-np.inf):
        selector = None
        if allowed is not None:
            selector = _faiss().IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        parameters = _parameters(self.index, self.effort, selector)
        k = min(k, self.index.ntotal)
        scores, positions = self.index.search(np.ascontiguousarray(z_query), k, params=parameters)
        valid = (positions >= 0) & (scores >= min_score)
        return (
            [row[f] for row, f in zip(positions, valid, strict=True)],
            [row[f] for row, f in zip(scores, valid, strict=True)],
        )


def _parameters(index: Any, effort: int, selector: Any) -> Any:
    """Make the parameters of one search, nested like the index."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    kind, selected = type(index).__name__, {} if selector is None else {"sel": selector}
    if "PreTransform" in kind:
        below = _parameters(index.index, effort, selector)
        return faiss.SearchParametersPreTransform(index_params=below)
    if "Refine" in kind:
        below = _parameters(index.base_index, effort, selector)
        factor = index.k_factor
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=below)
    if "IVF" in kind:
        return faiss.SearchParametersIVF(nprobe=effort, **selected)
    if "HNSW" in kind:
        return faiss.SearchParametersHNSW(efSearch=effort, **selected)
    return faiss.SearchParameters(**selected) if selected else None


def _effort(index: Any) -> tuple[str | None, int]:
    """Return the name of an index's search-effort parameter, and its largest useful value."""
    index = _faiss().downcast_index(index)
    kind = type(index).__name__
    if "PreTransform" in kind or "Refine" in kind:
        return _effort(index.index if "PreTransform" in kind else index.base_index)
    if "IVF" in kind:
        return "nprobe", index.nlist
    return ("efSearch", index.ntotal) if "HNSW" in kind else (None, 0)


def _sample(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Make queries to measure recall on, and the scores (q, k) of the k rows nearest to each.

    The queries are stored rows rotated in a random direction. Unrotated rows lie in dense regions
    and are found with far less effort than the texts or new images of real queries.
    """
    count, width = sum(map(len, rows)), rows[0].shape[1]
    rng = np.random.default_rng(0)
    at = np.sort(rng.choice(count, min(SAMPLE, count), replace=False))
    z = (np.concatenate(rows) if len(rows) > 1 else rows[0])[at].astype(np.float32)
    noise = rng.standard_normal(z.shape).astype(np.float32) / width**0.5
    z = COSINE * z + (1 - COSINE**2) ** 0.5 * noise
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z, np.stack(top_k(z, rows, min(NEAREST, count))[1])


def _build(rows: Sequence[np.ndarray], factory: str) -> Any:
    faiss = _faiss()
    try:
        index = faiss.index_factory(rows[0].shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(np.concatenate([np.asarray(block, np.float32) for block in rows]))
        for block in rows:
            index.add(np.asarray(block, np.float32))
    except RuntimeError as error:
        raise ConfigError(
            f"faiss cannot build an index {factory!r} of {sum(map(len, rows)):,} rows "
            f"({str(error).splitlines()[-1]}): see its index factory, such as 'Flat' or "
            "'IVF1024,Flat'"
        ) from None
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("faiss is not installed: pip install faiss-cpu") from None
    return faiss
