"""Benchmark of exact search: queries per second by index size, relative to memory bandwidth.

The time to read every stored row once, measured by copying the rows, is the time of a query for
which no bounds rule out rows; see `vlm.heads.pruned_search`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from vlm import display
from vlm.bench.measure import best_times
from vlm.heads.encoder import Rule
from vlm.heads.items import Stored
from vlm.heads.retrieval import RetrievalIndex


class _Embeddings:
    """Placeholder for a model: rows and queries are embeddings already."""

    name, logit_scale, logit_bias = "embeddings", 1.0, 0.0
    loss: Rule = "softmax"

    def encode_image(self, images: Iterable[Any], *, batch_size: int = 0) -> np.ndarray:
        raise NotImplementedError

    encode_text = encode_image


def bench_search(
    items: Sequence[int] = (10_000, 100_000),
    embed_dim: int = 512,
    *,
    queries: Sequence[int] = (1, 64),
    k: int = 10,
    dtype: Stored = "float32",
    rounds: int = 3,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure `RetrievalIndex.search` over random unit embeddings; print a table.

    Args:
        items: sizes of the index.
        queries: numbers of queries per search.
        dtype: dtype of the stored embeddings, float32 or float16.
        rounds: number of rounds; the best counts.

    Returns:
        the printed figures as JSON values.

    Raises:
        ConfigError: unknown dtype.

    Example:
        >>> from rich.console import Console
        >>> quiet = Console(quiet=True)
        >>> result = vlm.bench.bench_search((100,), 16, queries=(1,), rounds=1, console=quiet)
        >>> result["rows"][0]["items"]
        100
    """
    rng = np.random.default_rng(0)
    rows = []
    for n in items:
        z = rng.standard_normal((n, embed_dim), np.float32)
        index = RetrievalIndex(_Embeddings(), dtype=dtype)
        index.add(z, ids=range(n))
        make_bounds(index, z[0])
        copy = best_times({"copy": z.copy}, rounds)["copy"] / 2  # a copy reads and writes
        for count in queries:
            asked = z[rng.integers(0, n, count)]
            hits: Any = index.search(asked, k=k)  # a list, since queries are a batch
            found = sum(h[0].score > 0.999 for h in hits)
            run = functools.partial(index.search, asked, k=k)
            seconds = best_times({"search": run}, rounds)["search"]
            rows.append(
                {
                    "items": n,
                    "queries": count,
                    "seconds": seconds,
                    "queries_per_second": count / seconds,
                    "flops_per_second": 2 * n * embed_dim * count / seconds,
                    "times_reading": seconds / copy,
                    "found_themselves": found / count,
                }
            )
    result = {"embed_dim": embed_dim, "k": k, "dtype": dtype, "rows": rows}
    _print(result, console or Console())
    return result


def make_bounds(index: RetrievalIndex, query: np.ndarray) -> None:
    """Search until all blocks in memory have bounds, since a search makes those of one block.

    Args:
        query: (d,) an embedding.

    Example:
        >>> vlm.bench.search.make_bounds(index, index.embeddings()[0])
    """
    for _ in index._items.blocks:
        index.search(query)


def _print(result, console):
    console.print(
        f"[bold]Exact search[/] of {result['k']} nearest, width {result['embed_dim']}, "
        f"{result['dtype']}",
        highlight=False,
    )
    names = ("items", "queries at once", "time", "queries/s", "GFLOP/s", "x reading the rows")
    table = display.number_table(*names, text=0)
    for row in result["rows"]:
        table.add_row(
            f"{row['items']:,}",
            f"{row['queries']:,}",
            f"{1e3 * row['seconds']:.3g} ms",
            f"{row['queries_per_second']:,.0f}",
            f"{row['flops_per_second'] / 1e9:,.1f}",
            f"{row['times_reading']:.1f}",
        )
    console.print(table)
