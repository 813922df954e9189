"""Search on a mesh: results equal those of the host, one shard per device, one all-gather."""

import re

import jax
import numpy as np
import pytest

from vlm.errors import ConfigError
from vlm.heads import device_search
from vlm.heads.device_search import DeviceSearch
from vlm.heads.retrieval import RetrievalIndex
from vlm.heads.top_k import top_k


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"))


@pytest.mark.parametrize("count", [3, 8, 1000])
def test_results_equal_those_of_the_host(mesh, count, monkeypatch):
    """Integer-valued rows: products are exact and ties frequent, and order is that of the rows."""
    monkeypatch.setattr(device_search, "TILE", 16)
    rng = np.random.default_rng(count)
    rows = rng.integers(-2, 3, (count, 6)).astype(np.float32)
    query = rng.integers(-2, 3, (5, 6)).astype(np.float32)
    blocks = np.split(rows, [count // 3, count // 2])
    blocks = [b for b in blocks if len(b)]
    for allowed in (None, rng.random(count) < 0.3):
        for k, least in ((1, -np.inf), (20, -np.inf), (20, 1.0)):
            found = DeviceSearch(blocks, mesh).search(query, k, allowed, least)
            expected = top_k(query, blocks, k, allowed=allowed, min_score=least)
            for got, want in zip(found, expected, strict=True):
                for a, b in zip(got, want, strict=True):
                    np.testing.assert_array_equal(a, b)


def test_the_approximate_program_of_a_tpu_is_exact_on_cpu(mesh, monkeypatch):
    monkeypatch.setattr(device_search, "TILE", 16)
    rng = np.random.default_rng(0)
    rows, query = rng.standard_normal((300, 6)), rng.standard_normal((4, 6))
    search = DeviceSearch([rows.astype(np.float32)], mesh, approximate=True)
    mask = jax.device_put(np.arange(len(search.rows)) < 300, search.rows.sharding)
    score, tile = device_search._products, search._tile
    program = device_search.search_program(mesh, search._shard, tile, 5, score, approximate=True)
    _, positions = program(query.astype(np.float32), search.rows, mask)
    np.testing.assert_array_equal(positions, np.argsort(-query @ rows.T, axis=1)[:, :5])


def test_each_device_holds_one_shard_and_one_all_gather_collects_k_of_each(mesh):
    rows = np.random.default_rng(0).standard_normal((1000, 32)).astype(np.float32)
    search = DeviceSearch([rows], mesh)
    assert len(search.rows.sharding.device_set) == 8
    assert search.rows.sharding.shard_shape(search.rows.shape) == (125, 32)
    mask = jax.device_put(np.ones(len(search.rows), bool), search.rows.sharding)
    text = search.program(10).lower(rows[:4], search.rows, mask).compile().as_text()
    gathers = re.findall(r"= (\S+) all-gather\(", text)
    assert len(gathers) == 1
    shape = [int(n) for n in re.search(r"\[([\d,]+)\]", gathers[0])[1].split(",")]
    assert np.prod(shape) == 2 * 4 * 10 * 8  # a score and a position, of 4 queries and 8 devices
    assert "all-reduce" not in text


def test_an_index_on_devices(mesh, model):
    index = RetrievalIndex(model, dtype="float16")
    z = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    index.add(z)
    on_host = index.search(z[:3], k=5)
    index.place(mesh, approximate=True)
    assert [[h.id for h in hits] for hits in index.search(z[:3], k=5)] == [
        [h.id for h in hits] for hits in on_host
    ]
    index.remove(0)
    index.add(z[:1], ids=["again"])
    assert index.search(z[0], k=1)[0].id == "again"
    index.place(None)
    assert index.search(z[0], k=1)[0].id == "again"
    with pytest.raises(ConfigError, match="the index is empty"):
        DeviceSearch([], mesh)
