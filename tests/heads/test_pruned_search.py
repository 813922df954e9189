"""Pruned search: bounds rule out most rows and never change the results."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.heads import items, pruned_search
from vlm.heads.pruned_search import Bounds, Pruner
from vlm.heads.retrieval import RetrievalIndex
from vlm.heads.top_k import top_k


def unit(n, d=64, seed=0):
    z = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def rows_of(kind, rng, n):
    """Whole numbers, so that products are exact and a wrong order is not due to rounding."""
    if kind == "ties":
        return rng.integers(-2, 3, (n, 8))
    if kind == "near duplicates":  # closer to each other than the resolution of int8 codes
        return rng.integers(-900, 900, (1, 8)) + rng.integers(-1, 2, (n, 8))
    if kind == "clusters":
        return rng.integers(-900, 900, (3, 8))[rng.integers(0, 3, n)] + rng.integers(-3, 4, (n, 8))
    if kind == "equal":
        return np.full((n, 8), 7)
    return rng.integers(-900, 900, (n, 8)) * (rng.random((n, 1)) < 0.9)  # of any length, and zero


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["ties", "near duplicates", "clusters", "equal", "lengths"]),
    dtype=st.sampled_from([np.float32, np.float16]),
    filtered=st.booleans(),
)
def test_a_search_with_bounds_is_the_plain_search(seed, kind, dtype, filtered):
    rng = np.random.default_rng(seed)
    rows = rows_of(kind, rng, rng.integers(1, 300)).astype(dtype)
    query = rng.integers(-900, 900, (rng.integers(1, 6), 8)).astype(np.float32)
    blocks = [b for b in np.split(rows, np.sort(rng.integers(0, len(rows) + 1, 2))) if len(b)]
    options = {
        "k": int(rng.choice([1, 3, 10, len(rows), len(rows) + 5])),
        "allowed": rng.random(len(rows)) < rng.choice([0.05, 0.5, 0.95]) if filtered else None,
        "min_score": float(rng.choice([-np.inf, 0, 1000])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruned_search, "TILE", 32)
        bounds = [Bounds(block) if rng.random() < 0.8 else None for block in blocks]
        found = top_k(query, blocks, bounds=bounds, **options)
    for ours, plain in zip(found, top_k(query, blocks, **options), strict=True):
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_no_row_is_ruled_out_by_a_floor_below_its_own_score(offset):
    """Also with a dimension that dwarfs the others, and with a floor one rounding below."""
    rows = unit(512) * np.linspace(0, 2, 512, dtype=np.float32)[:, None]
    rows[:, 3] += offset
    query = unit(5, seed=1) * np.float32(10)
    bounds, pruner = Bounds(rows), Pruner(query)
    products = query @ rows.T
    for row in range(0, 512, 37):
        floor = np.nextafter(products[:, row], np.float32(-np.inf))
        for q in range(5):
            one_query = np.where(np.arange(5) == q, floor, np.float32(np.inf))
            surviving = pruner.surviving(bounds, 0, one_query)
            assert surviving[products[q] > floor[q]].all()
    assert not pruner.surviving(bounds, 0, np.full(5, 1e9, np.float32)).any()


def test_most_rows_are_ruled_out():
    """For random rows, the hardest case, and rows with a common direction, as real ones have."""
    rows = unit(8192, 256)
    for z in (rows, rows + unit(1, 256, seed=2)):
        query = z[:4] + 0.5 * unit(4, 256, seed=3)
        tenth = np.sort(query @ z.T, axis=1)[:, -10]
        share = Pruner(query).surviving(Bounds(z), 0, tenth).mean()
        assert 6 / 8192 < share < 0.02


def test_blocks_in_memory_get_bounds_one_with_each_search(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pruned_search, "LEAST_ROWS", 16)
    monkeypatch.setattr(items, "LARGE", 100)
    monkeypatch.setattr(items, "SMALL", 16)
    index = RetrievalIndex(model)

    def have():
        return [block.bounds is not None for block in index._items.blocks]

    first, then = unit(80, 16), unit(80, 16, seed=1)
    index.add(first, ids=range(80))
    index.search(first[0])
    assert have() == [False]  # a small index
    index.add(then, ids=range(80, 160))
    plain = [hit.id for hit in index.search(then[3], k=5)]
    assert plain[0] == 83
    assert have() == [True, False]
    index.search(then[3])
    assert have() == [True, True]
    assert [hit.id for hit in index.search(then[3], k=5)] == plain
    index.remove(83)
    assert [hit.id for hit in index.search(then[3], k=4)] == plain[1:]
    index.save(tmp_path / "index")
    index.search(first[0])
    assert have() == [False]  # memory-mapped
    assert [hit.id for hit in index.search(then[3], k=4)] == plain[1:]


def test_a_search_backs_off_from_bounds_that_prune_too_little(monkeypatch):
    monkeypatch.setattr(pruned_search, "TILE", 64)
    asked = []
    real = Pruner.surviving
    monkeypatch.setattr(Pruner, "surviving", lambda *a: asked.append(a[2]) or real(*a))
    equal = np.ones((64 * 40, 16), np.float32)
    at, _ = top_k(equal[:1], [equal], 5, bounds=[Bounds(equal)])
    np.testing.assert_array_equal(at[0], range(5))
    assert asked == [1, 3, 7, 15, 31]
    asked.clear()
    rows = unit(64 * 40)
    top_k(rows[:1], [rows], 1, bounds=[Bounds(rows)])
    assert asked == list(range(1, 40))
