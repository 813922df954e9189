"""Retrieval index: exact results, its folder, and errors."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import CheckpointError, ConfigError, DataError, VlmError
from vlm.heads import index_folder, retrieval, top_k
from vlm.heads.hits import picture_of
from vlm.heads.retrieval import Hits, RetrievalIndex

COLOURS = ["red", "green", "blue", "yellow", "white", "black"]


@pytest.fixture
def folder(tmp_path, paint):
    for i, colour in enumerate(COLOURS):
        paint(colour, noise=10, seed=i).save(tmp_path / f"{colour}.png")
    return tmp_path


@pytest.fixture
def index(model, folder):
    index = RetrievalIndex(model)
    index.add([folder / f"{colour}.png" for colour in COLOURS])
    return index


def names(hits):
    return [Path(hit.id).stem for hit in hits]


def assert_same(hits, other):
    """The same ids in the same order; the last bit of a product depends on its tile's shape."""
    assert [h.id for h in hits] == [h.id for h in other]
    np.testing.assert_allclose([h.score for h in hits], [h.score for h in other], atol=1e-6)


# ------------------------------------------------------------------------------- exactness


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), k=st.integers(1, 30), tile=st.sampled_from([1, 200, 1 << 20])
)
def test_top_k_equals_a_full_stable_sort(seed, k, tile):
    """Integer-valued rows make products exact and ties frequent: order must be that of the rows."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, (rng.integers(1, 60), 3)).astype(np.float32)
    query = rng.integers(-2, 3, (5, 3)).astype(np.float32)
    blocks = np.split(rows, np.sort(rng.integers(0, len(rows) + 1, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "PRODUCT_BYTES", tile)
        patch.setattr(top_k, "FIRST_ROWS", 1 + seed % 9)
        positions, scores = top_k.top_k(query, [b for b in blocks if len(b)], k)
    products = query @ rows.T
    for row, at, values in zip(products, positions, scores, strict=True):
        np.testing.assert_array_equal(at, np.argsort(-row, kind="stable")[:k])
        np.testing.assert_array_equal(values, row[at])


def test_search_memory_is_bounded_by_a_tile(monkeypatch):
    """All products would take 80 MB; a float16 index of 13 MB is widened 1 MB at a time."""
    monkeypatch.setattr(top_k, "PRODUCT_BYTES", 1 << 20)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200_000, 32)).astype(np.float16)
    query = rng.standard_normal((100, 32)).astype(np.float32)
    tracemalloc.start()
    top_k.top_k(query, [rows], 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_text_image_and_embedding_queries_agree(index, folder, model, paint):
    assert names(index.search("the colour blue", k=2))[0] == "blue"
    assert names(index.search(folder / "red.png", k=1)) == ["red"]
    assert names(index.search(np.asarray(paint("green")), k=1)) == ["green"]
    z = model.encode_text(["yellow"])[0]
    by_text, by_vector = index.search("yellow", k=6), index.search(3 * z, k=6)  # any length
    assert names(by_text) == names(by_vector)
    assert by_text[0].id == str(folder / "yellow.png")
    for hit, z in zip(index.search(paint("red"), k=6), by_text, strict=True):
        assert -1.000001 <= hit.score <= 1.000001, z
    assert index.search(folder / "red.png", k=1)[0].score == pytest.approx(1, abs=1e-6)


def test_a_list_of_queries_gives_a_list_of_results(index, model, paint):
    both = index.search(["red", "blue"], k=3)
    assert_same(both[0], index.search("red", k=3))
    assert_same(both[1], index.search("blue", k=3))
    assert [names(h)[0] for h in index.search([paint("red"), paint("white")], k=1)] == [
        "red",
        "white",
    ]
    z = model.encode_text(["red", "blue"])
    assert [names(h) for h in index.search(z, k=3)] == [names(h) for h in both]
    assert index.search([]) == []


def test_fewer_items_than_k_and_none_at_all(index, model):
    assert len(index.search("red")) == 5
    assert len(index.search("red", k=1)) == 1
    assert index.search([], k=1) == []
    assert len(index.search("red", k=100)) == 6
    assert RetrievalIndex(model).search("red") == []


def test_many_queries_go_in_blocks(model, monkeypatch):
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 3)
    index = RetrievalIndex(model)
    index.add([f"word {i}" for i in range(20)])
    results = index.search([f"word {i}" for i in range(20)], k=1)
    assert [hits[0].id for hits in results] == list(range(20))


# --------------------------------------------------------------------------------- adding


def test_default_ids_are_paths_or_running_numbers(index, folder, paint, model):
    assert index.ids == tuple(str(folder / f"{c}.png") for c in COLOURS)
    index.add([paint("red"), paint("blue")])
    assert index.ids[6:] == (6, 7)
    index.add("a lone text", ids="note")
    assert index.ids[8] == "note"
    assert len(index) == 9


def test_a_stream_is_encoded_in_bounded_chunks(model, paint, monkeypatch):
    """The stream is never further ahead of the encoder than a chunk, and its order is kept."""
    monkeypatch.setattr(retrieval, "CHUNK", 4)
    drawn = []

    def stream():
        for i in range(10):
            drawn.append(i)
            assert i - model.seen <= 4
            yield paint(COLOURS[i % 6], noise=5, seed=i)

    index = RetrievalIndex(model)
    index.add(stream(), ids=(f"p{i}" for i in range(10)))
    assert drawn == list(range(10))
    assert index.ids == tuple(f"p{i}" for i in range(10))
    assert index.search(paint(COLOURS[4], noise=5, seed=4), k=1)[0].id == "p4"


def test_images_that_cannot_be_read_are_reported_and_left_out(model, paint, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 2)
    (tmp_path / "corrupt.png").write_bytes(b"corrupt")
    pictures = [paint(colour) for colour in COLOURS]
    pictures[3] = tmp_path / "corrupt.png"  # the second of its chunk
    index, unread = RetrievalIndex(model), []
    index.add(
        pictures, ids=COLOURS, metadata={"n": range(6)}, on_error=lambda at, _: unread.append(at)
    )
    left = [colour for colour in COLOURS if colour != "yellow"]
    assert unread == [3]
    assert index.ids == tuple(left)
    assert index.columns == {"n": [0, 1, 2, 4, 5]}
    assert [index.search(paint(c), k=1)[0].id for c in left] == left


@pytest.mark.untyped
def test_ids_of_every_form(model):
    index = RetrievalIndex(model)
    index.add(["a", "b", "c", "d"], ids=[Path("x"), np.int64(7), "y", -1])
    assert index.ids == ("x", 7, "y", -1)
    assert [type(name) for name in index.ids] == [str, int, str, int]
    index.add(["e"])
    assert index.ids[-1] == 8  # above every number so far


def test_half_precision_halves_the_rows_and_keeps_the_cosines(model, index, folder):
    half = RetrievalIndex(model, dtype="float16")
    half.add([folder / f"{colour}.png" for colour in COLOURS])
    exact = {hit.id: hit.score for hit in index.search("red", k=6)}
    for hit in half.search("red", k=6):
        assert hit.score == pytest.approx(exact[hit.id], abs=1e-3)
    assert half._items.rows[0].nbytes * 2 == index._items.rows[0].nbytes


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("items", "ids", "message"),
    [
        (["a", "b"], ["x", "x"], "'x' is in the index already"),
        (["a", "b"], ["x"], "only 1 ids"),
        (["a"], ["x", "y"], "more ids than the 1 items"),
        (["a", "b"], "xy", "give a list with one id per item"),
        (["a"], [3.5], "neither a text nor an integer"),
        (["a"], [True], "neither a text nor an integer"),
        (["a", np.zeros((4, 4, 3), np.uint8)], None, "as item 1, image"),
        ([object()], None, "add got a object"),
        (7, None, "add got a int"),
        (np.ones((2, 5), np.float32), None, "embeddings of 5 dimensions"),
        ([np.ones(4, np.float32), np.ones(5, np.float32)], None, "several widths"),
    ],
)
def test_a_refused_add_changes_nothing(index, items, ids, message):
    before = index.search("red", k=9)
    with pytest.raises(VlmError, match=message):
        index.add(items, ids=ids)
    assert len(index) == 6
    assert index.search("red", k=9) == before


@pytest.mark.untyped
def test_other_refusals(index, folder, model):
    with pytest.raises(ConfigError, match=r"wrap it in pathlib\.Path"):
        index.add([str(folder / "red.png")])
    with pytest.raises(ConfigError, match=r"wrap it in pathlib\.Path"):
        index.search(str(folder / "red.png"))
    with pytest.raises(ConfigError, match="is in the index already"):
        index.add(folder / "red.png")
    with pytest.raises(ConfigError, match="k is 0"):
        index.search("red", k=0)
    with pytest.raises(DataError, match="search got a NoneType"):
        index.search(None)
    with pytest.raises(ConfigError, match="query 1 is image"):
        index.search(["red", folder / "red.png"])
    with pytest.raises(ConfigError, match="query of 3 dimensions"):
        index.search(np.ones(3, np.float32))
    with pytest.raises(DataError, match="length is nan"):
        index.search(np.full(16, np.nan, np.float32))
    with pytest.raises(DataError, match=r"length is 0\.0"):
        index.add(np.zeros((1, 16), np.float32))
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        RetrievalIndex(model, dtype="int8")


# ---------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_save_and_load_give_the_same_answers(model, folder, tmp_path, dtype):
    index = RetrievalIndex(model, dtype)
    index.add([folder / f"{colour}.png" for colour in COLOURS])
    index.add(["some text", "other text"], ids=[41, 42])
    index.save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index", model)
    assert isinstance(loaded._items.rows[0], np.memmap)
    assert loaded.ids == index.ids
    assert loaded.dtype == dtype
    for query in ("red", "white", "some text"):
        assert_same(loaded.search(query, k=9), index.search(query, k=9))


def test_a_loaded_index_grows_and_saves_over_itself(model, index, tmp_path):
    index.save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index", model)
    loaded.add(["night"])
    loaded.save(tmp_path / "index")
    again = RetrievalIndex.load(tmp_path / "index", model)
    assert again.ids == (*index.ids, 6)
    assert loaded.search("night", k=1)[0].id == 6
    assert len(list((tmp_path / "index").glob("rows-*"))) == 2  # the first shard stayed as it was


def test_a_save_that_dies_leaves_the_old_index(model, index, tmp_path, monkeypatch):
    index.save(tmp_path / "index")
    index.add(["more"])

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_folder.os, "replace", die)  # the last step
    with pytest.raises(KeyboardInterrupt):
        index.save(tmp_path / "index")
    monkeypatch.undo()
    assert len(RetrievalIndex.load(tmp_path / "index", model)) == 6
    index.save(tmp_path / "index")
    assert len(RetrievalIndex.load(tmp_path / "index", model)) == 7
    assert len(list((tmp_path / "index").iterdir())) == 6  # two shards, the lock, nothing left over


def test_another_model_is_refused(index, make_model, tmp_path):
    index.save(tmp_path / "index")
    with pytest.raises(CheckpointError, match="16 dimensions and the model 'colours' makes 8"):
        RetrievalIndex.load(tmp_path / "index", make_model(embed_dim=8))
    with pytest.raises(CheckpointError, match="'colours' embeds differently"):
        RetrievalIndex.load(tmp_path / "index", make_model(seed=1))  # the same name


def test_a_model_that_shares_only_the_text_tower_is_refused(index, make_model, tmp_path):
    index.save(tmp_path / "index")
    renamed = make_model()
    renamed.name = "runs/colours"
    assert len(RetrievalIndex.load(tmp_path / "index", renamed)) == 6  # the same weights, moved
    other, stranger = make_model(), make_model(seed=1)
    other.encode_image = stranger.encode_image
    with pytest.raises(CheckpointError, match="'colours' embeds differently"):
        RetrievalIndex.load(tmp_path / "index", other)


def test_equal_fingerprints_skip_the_image_probe(index, make_model, tmp_path):
    index.model.fingerprint = "abc"
    index.save(tmp_path / "index")
    model = make_model()
    model.fingerprint = "abc"
    RetrievalIndex.load(tmp_path / "index", model)
    assert model.seen == 0
    model.fingerprint = "def"  # the same weights in another file
    RetrievalIndex.load(tmp_path / "index", model)
    assert model.seen == 1


def test_corrupt_and_foreign_folders(index, model, tmp_path):
    with pytest.raises(CheckpointError, match="holds no index"):
        RetrievalIndex.load(tmp_path / "nowhere", model)
    path = tmp_path / "index"
    index.save(path)
    meta = json.loads((path / "index.json").read_text())

    def broken(match, **changes):
        (path / "index.json").write_text(json.dumps({**meta, **changes}))
        with pytest.raises(CheckpointError, match=match):
            RetrievalIndex.load(path, model)

    broken("version 99", version=99)
    broken("does not describe", format="something")
    shard = meta["shards"][0]
    broken("no valid 'shards'", shards=None)
    broken(r"is corrupt \(6 ids", shards=[{**shard, "count": 5}])
    broken("is corrupt", probe_text=[1.0])
    broken("duplicate ids", shards=[shard, shard])
    broken("cannot be read", shards=[{**shard, "name": "gone"}])
    broken("codes of an unknown kind", coding="pq")
    broken("cannot be read", removed="removed-gone.npy")
    ids = path / f"items-{shard['name']}.json"
    whole = ids.read_text()
    for text, match in (
        ("{", "is not JSON"),
        ("[]", "is corrupt"),
        ('{"ids": [1]}', r"corrupt \(1 ids"),
    ):
        ids.write_text(text)
        broken(match)
    ids.write_text(whole)
    (path / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        RetrievalIndex.load(path, model)
    (path / "index.json").write_text(json.dumps(meta))
    data = path / f"rows-{shard['name']}.npy"
    data.write_bytes(data.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cannot be read"):
        RetrievalIndex.load(path, model)


def test_saving_never_overwrites_other_files(index, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="other files and no index"):
        index.save(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a file"):
        index.save(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(ConfigError, match="empty"):
        RetrievalIndex(model).save(tmp_path / "new")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_displays(index):
    assert "RetrievalIndex(colours, 6 x 16 float32" in repr(index)
    page = index.search("red", k=2)._repr_html_()
    assert page.count("<img") == 2
    assert "red.png" in page
    assert "no hits" in Hits()._repr_html_()
    assert picture_of("a red square") == picture_of(3) == ""  # names that are no picture's path
