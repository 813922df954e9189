"""Late interaction: equal to MaxSim in plain NumPy, on the host, by codes and on a mesh."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.heads import MultiVectorIndex, image_tokens, max_similarity, text_tokens

GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def brute_force(query, items):
    """MaxSim by its definition, in float64."""
    return np.array([sum(max(float(q @ v) for v in unit(z)) for q in unit(query)) for z in items])


def ragged(seed, count, width=24, most=7):
    """Items of 1 to `most` vectors, around a common direction as those of a CLIP are."""
    rng = np.random.default_rng(seed)
    centre = 2 * rng.standard_normal(width)
    return [rng.standard_normal((rng.integers(1, most + 1), width)) + centre for _ in range(count)]


@pytest.fixture(params=[None, "int8", "binary", "mesh"])
def index(request):
    made = MultiVectorIndex(coding=None if request.param == "mesh" else request.param)
    if request.param == "mesh":
        made.place(jax.make_mesh((4, 2), ("data", "fsdp")))
    return made


@pytest.mark.parametrize("count", [1, 5, 61])
def test_scores_are_those_of_the_definition(index, count, monkeypatch):
    """Few items: all are candidates of the codes, so that the results are exact."""
    monkeypatch.setattr(max_similarity, "PRODUCT_BYTES", 1000)
    monkeypatch.setattr(max_similarity, "DEVICE_BYTES", 200_000)
    items, queries = ragged(0, count), ragged(1, 3)
    index.add(items[: count // 2])
    index.add(items[count // 2 :])
    for query, hits in zip(queries, index.search(queries, k=4), strict=True):
        expected = brute_force(query, items)
        order = np.argsort(-expected, kind="stable")[:4]
        assert [hit.id for hit in hits] == order.tolist()
        assert np.allclose([hit.score for hit in hits], expected[order], atol=2e-6)
        assert np.allclose(index.scores(query), expected, atol=2e-6)
    assert index.search(queries[0], k=4) == index.search(queries, k=4)[0]


def test_an_item_with_negative_cosines_is_not_helped_by_padding(index):
    query = np.array([[1.0, 0.0]])
    index.add([np.array([[-1.0, 0.1]]), np.array([[-1.0, 0.5], [-1.0, 1.0], [-1.0, 0.2]])])
    first, second = index.search(query, k=2)
    assert [first.id, second.id] == [1, 0]
    assert second.score == pytest.approx(-1 / np.hypot(1, 0.1))


def test_ties_keep_the_order(index):
    index.add([np.eye(3)[[0, 1]]] * 9, ids=list("abcdefghi"))
    assert [hit.id for hit in index.search(np.eye(3)[[0]], k=3)] == ["a", "b", "c"]


@pytest.mark.parametrize(("coding", "least"), [("int8", 0.99), ("binary", 0.9)])
def test_recall_of_codes(coding, least):
    items, queries = ragged(2, 3000, width=64), ragged(3, 20, width=64)
    index = MultiVectorIndex(coding=coding)
    index.add(items)
    assert index.recall(queries, k=10) >= least
    exact = MultiVectorIndex()
    exact.add(items)
    assert exact.recall(queries, k=10) == 1
    assert index.search(queries[0], k=1)[0].score <= exact.search(queries[0], k=1)[0].score + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("coding", [None, "binary"])
def test_saved_and_loaded(tmp_path, dtype, coding):
    index = MultiVectorIndex(dtype=dtype, coding=coding)
    items = ragged(4, 30)
    index.add(items, ids=[f"item {i}" for i in range(30)])
    index.save(tmp_path / "index")
    again = MultiVectorIndex.load(tmp_path / "index")
    assert again.search(items[3], k=3) == index.search(items[3], k=3)
    assert again.search(items[3], k=1)[0].id == "item 3"
    again.add(items[:1], ids=["one more"])
    again.save(tmp_path / "index")
    assert len(MultiVectorIndex.load(tmp_path / "index")) == 31
    assert repr(again).startswith("MultiVectorIndex(31 items, ")


@pytest.mark.parametrize(
    "change",
    [
        {"ids": ["a"]}, {"lengths": [1, 2]}, {"lengths": [0] * 4}, {"lengths": "x"}, {"ids": None},
        {"ids": [["a"]] * 4}, {"coding": "pq"}, {"ids": ["a"] * 4},
    ],
)  # fmt: skip
def test_a_corrupt_index_is_refused(change, tmp_path):
    index = MultiVectorIndex()
    index.add(ragged(5, 4))
    index.save(tmp_path / "index")
    file = tmp_path / "index" / "multi_vector.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match="index is corrupt"):
        MultiVectorIndex.load(tmp_path / "index")


def test_truncated_vectors_are_refused(tmp_path):
    index = MultiVectorIndex()
    index.add(ragged(5, 4))
    index.save(tmp_path / "index")
    file = tmp_path / "index" / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="index is corrupt"):
        MultiVectorIndex.load(tmp_path / "index")
    with pytest.raises(CheckpointError, match=r"multi_vector\.json"):
        MultiVectorIndex.load(tmp_path / "nothing")


@pytest.mark.untyped
def test_wrong_input_is_refused_and_changes_nothing(tmp_path):
    (picture := tmp_path / "a.png").write_bytes(b"a picture")
    index, good = MultiVectorIndex(), ragged(6, 2)
    index.add(good)
    wrong = [
        ([*good, np.zeros((0, 24))], None, DataError, "item 2 has no vectors"),
        ([np.ones((2, 5))], None, ConfigError, "item 0 has vectors of 5 dimensions.*others 24"),
        ([np.full((2, 24), np.nan)], None, DataError, "a vector of item 0 is zero or not finite"),
        ([np.zeros((1, 24))], None, DataError, "zero or not finite"),
        (["a text"], None, ConfigError, "item 0 is a str, and the index has no model"),
        ([np.ones(24)], None, ConfigError, "item 0 is one vector"),
        ([str(picture)], None, ConfigError, "item got the text .* is the path of a picture"),
        ([3], None, DataError, "item got a int"),
        (good, ["a"], ConfigError, "there are only 1 ids"),
        (good, ["a", "b", "c"], ConfigError, "id 'c' has no item"),
        (good, ["a", "a"], ConfigError, "id 'a' is in the index already"),
        (good, [0, 5], ConfigError, "id 0 is in the index already"),
        (good, [1.5, 2], ConfigError, "neither a text nor an integer"),
    ]
    for items, ids, kind, message in wrong:
        with pytest.raises(kind, match=message):
            index.add(items, ids)
        assert len(index) == 2
    for query, k, kind, message in [
        (good[0], 0, ConfigError, "k is 0"),
        (np.ones((1, 3)), 1, ConfigError, "query 0 has vectors of 3 dimensions"),
        (np.ones((0, 24)), 1, DataError, "query 0 has no vectors"),
        ("a text", 1, ConfigError, "query 0 is a str"),
        (np.ones(24), 1, ConfigError, "query 0 is one vector"),
        (str(picture), 1, ConfigError, "query got the text .* is the path of a picture"),
    ]:
        with pytest.raises(kind, match=message):
            index.search(query, k)
    with pytest.raises(ConfigError, match="coding is 'pq'"):
        MultiVectorIndex(coding="pq")  # pyright: ignore
    with pytest.raises(ConfigError, match="the index is empty"):
        MultiVectorIndex().save("somewhere")
    with pytest.raises(ConfigError, match="0 queries"):
        index.recall([])
    assert MultiVectorIndex().search(good[0]) == []
    index.add([])
    assert index.search([], k=1) == []


# ------------------------------------------------------------------------- vectors of the towers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "oc_coca", "hf_naflex"])
def test_vectors_of_tokens_are_those_of_the_tower_without_padding(name):
    model = vlm.load(GOLDEN / name)
    texts = ["a cat", "two dogs in the snow", ""]
    found = text_tokens(model, texts, batch_size=2)
    rows = model.tokenizer(texts)
    lengths = np.minimum(model.tokenizer.lengths(texts), rows.shape[1])
    for z, row, length in zip(found, rows, lengths, strict=True):
        whole = np.asarray(model.model.text.dense(jnp.asarray(row[None])))[0]
        left = model.tokenizer.config.pad_side == "left"
        assert np.allclose(z, unit(whole[-length:] if left else whole[:length]), atol=1e-5)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((40, 30), (24, 64), (9, 9))]
    patches = image_tokens(model, pictures, batch_size=2)
    one_by_one = [image_tokens(model, picture)[0] for picture in pictures]
    for z, alone in zip(patches, one_by_one, strict=True):
        assert z.shape == alone.shape
        assert np.allclose(z, alone, atol=1e-5)
        assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    if name == "hf_naflex":
        assert len({len(z) for z in patches}) > 1


def test_the_pooled_token_is_the_embedding():
    """CLIP's text embedding is that of its end token."""
    model = vlm.load(GOLDEN / "hf_clip")
    texts = ["a cat", "two dogs"]
    last = np.stack([z[-1] for z in text_tokens(model, texts)])
    assert np.allclose(last, model.encode_text(texts), atol=1e-5)


@pytest.mark.slow
def test_images_by_text_of_a_model(tmp_path):
    model = vlm.load(GOLDEN / "hf_clip")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(5)]
    index = MultiVectorIndex(model)
    index.add(pictures, ids=list("abcde"))
    index.add("a text")
    patches, words = image_tokens(model, pictures), text_tokens(model, "two dogs")
    (hits,) = index.search(["two dogs"], k=6)
    scores = dict(zip(index.ids, index.scores("two dogs"), strict=True))
    expected = brute_force(words[0], [*patches, *text_tokens(model, "a text")])
    assert np.allclose(list(scores.values()), expected, atol=1e-5)
    assert hits[0].score == pytest.approx(expected.max(), abs=1e-5)
    index.save(tmp_path / "index")
    again = MultiVectorIndex.load(tmp_path / "index", model)
    assert again.search("two dogs", k=3) == index.search("two dogs", k=3)
    with pytest.raises(CheckpointError):
        MultiVectorIndex.load(tmp_path / "index", vlm.load(GOLDEN / "hf_siglip"))


def test_a_tower_that_is_missing_is_named():
    model = vlm.load(GOLDEN / "st_bert")
    with pytest.raises(ConfigError, match="has no vision tower"):
        image_tokens(model, [np.zeros((8, 8, 3), np.uint8)])


def test_widths_are_checked_over_all_items_of_an_add(monkeypatch):
    monkeypatch.setattr("vlm.heads.multi_vector.CHUNK", 2)
    index = MultiVectorIndex()
    with pytest.raises(ConfigError, match="item 2 has vectors of 4 dimensions, and the others 8"):
        index.add([np.eye(8)[:2], np.eye(8)[:1], np.eye(4)])
    assert len(index) == 0


def test_arrays_of_bfloat16_are_vectors():
    index = MultiVectorIndex()
    index.add([jnp.eye(3, dtype=jnp.bfloat16)], ids=["a"])
    assert index.search(jnp.eye(3, dtype=jnp.bfloat16), k=1)[0].score == pytest.approx(3)


def test_an_index_that_is_saved_without_its_model_still_belongs_to_it(tmp_path):
    models = [vlm.load(GOLDEN / name) for name in ("hf_clip", "hf_siglip")]
    index = MultiVectorIndex(models[0])
    index.add(["a cat", "two dogs"], ids=[0, 1])
    index.save(tmp_path / "first")
    MultiVectorIndex.load(tmp_path / "first").save(tmp_path / "second")
    assert MultiVectorIndex.load(tmp_path / "second", models[0]).search("a cat", k=1)[0].id == 0
    with pytest.raises(CheckpointError):
        MultiVectorIndex.load(tmp_path / "second", models[1])
