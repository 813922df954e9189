"""Composed queries."""

import numpy as np
import pytest

from vlm.errors import ConfigError, DataError
from vlm.heads.query import Query, embed_queries
from vlm.heads.retrieval import RetrievalIndex


def test_a_query_is_the_weighted_sum_of_its_parts(model, paint):
    z = model.encode_text(["red", "blue"])
    seen = model.encode_image([paint("green")])[0]
    query = 2 * Query("red") + Query(paint("green"), 0.5) - Query("blue")
    expected = 2 * z[0] + 0.5 * seen - z[1]
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(embed_queries(model, [query])[0], expected, atol=1e-6)
    both = embed_queries(model, [Query("red"), -Query(3 * z[1]) * 4])  # any length, any weight
    np.testing.assert_allclose(both, [z[0], -z[1]], atol=1e-6)
    assert repr(2 * Query("a") - Query("b")) == "Query(+2 x 'a' -1 x 'b')"


def test_search_by_queries(model, paint):
    index = RetrievalIndex(model)
    colours = ["red", "green", "yellow", "white"]
    index.add([paint(c) for c in colours], ids=colours)
    for query in (Query("red") + Query("green"), Query(paint("yellow")) - Query("green")):
        cosines = index.embeddings() @ embed_queries(model, [query])[0]
        expected = [colours[i] for i in np.argsort(-cosines)]
        assert [hit.id for hit in index.search(query, k=9)] == expected
    both = index.search([Query("red"), Query("green") * 2], k=1)
    assert [hits[0].id for hits in both] == ["red", "green"]


@pytest.mark.untyped
def test_bad_queries(model, paint):
    with pytest.raises(DataError, match="is zero or not finite"):
        embed_queries(model, [Query("red") - Query("red")])
    with pytest.raises(ConfigError, match="the weight 0"):
        0 * Query("red")
    with pytest.raises(ConfigError, match="the weight nan"):
        Query("red", float("nan"))
    with pytest.raises(ConfigError, match=r"such as Query\('blue'\)"):
        Query("red") + "blue"
    with pytest.raises(DataError, match="a query got a NoneType"):
        Query(None)
    with pytest.raises(ConfigError, match="have 3 and 16 dimensions"):
        embed_queries(model, [Query("red") + Query(np.ones(3, np.float32))])
