"""clip-retrieval folders and faiss indexes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.heads import exchange
from vlm.heads.exchange import read_clip_retrieval, write_clip_retrieval
from vlm.heads.faiss_index import faiss_search, to_faiss
from vlm.heads.retrieval import RetrievalIndex


def unit(n, d=16, seed=0):
    z = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_a_folder_as_clip_retrieval_writes_it(model, tmp_path, caplog):
    """Half precision, partitions with leading zeros, and columns of lists."""
    z = unit(25).astype(np.float16)
    for folder in ("img_emb", "text_emb", "metadata"):
        (tmp_path / folder).mkdir()
    for part, rows in enumerate((slice(0, 10), slice(10, 25))):
        np.save(tmp_path / f"img_emb/img_emb_{part:02}.npy", z[rows])
        n = len(z[rows])
        table = {
            "image_path": [f"{part}/{i}.jpg" for i in range(n)],
            "caption": [f"caption {i}" for i in range(n)],
            "similarity": pa.array(np.linspace(0, 1, n), pa.float32()),
            "exif": [[1, 2]] * n,
        }
        pq.write_table(pa.table(table), tmp_path / f"metadata/metadata_{part:02}.parquet")
    index = read_clip_retrieval(tmp_path, model)
    assert len(index) == 25
    assert index.search(z[12].astype(np.float32), k=1)[0].id == "1/2.jpg"
    assert index.metadata("1/2.jpg")["caption"] == "caption 2"
    assert set(index.columns) == {"caption", "similarity"}
    assert "left out columns of" in caplog.text
    assert "exif (list<" in caplog.text
    with pytest.raises(CheckpointError, match="no text_emb/text_emb_0"):
        read_clip_retrieval(tmp_path, model, modality="text")


def test_round_trip(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "PARTITION", 7)
    index = RetrievalIndex(model)
    index.add(unit(20), ids=[f"{i}.png" for i in range(20)], metadata={"n": range(20)})
    index.remove("3.png")
    (tmp_path / "out").mkdir()  # an empty folder is accepted
    write_clip_retrieval(index, tmp_path / "out")
    assert len(list((tmp_path / "out/img_emb").iterdir())) == 3
    again = read_clip_retrieval(tmp_path / "out", model)
    assert again.ids == index.ids
    assert again.columns == index.columns
    np.testing.assert_allclose(again.embeddings(), index.embeddings(), atol=1e-6)
    (tmp_path / "file").write_text("mine")
    for taken in ("out", "file"):
        with pytest.raises(CheckpointError, match="exists already"):
            write_clip_retrieval(index, tmp_path / taken)


@pytest.mark.parametrize(
    "names",
    [
        [3, 1, 2**70, 0, -5],
        ["a.png", 7, "7", "é 象.png", 8],
        ["1", "2", "3", "04", "5"],
    ],
)
def test_ids_keep_their_types(model, tmp_path, names, monkeypatch):
    """In a folder of clip-retrieval, in a saved index and through a merge."""
    monkeypatch.setattr(exchange, "PARTITION", 2)
    index = RetrievalIndex(model)
    metadata = {"n": [1, 2, 3, None, 5], "f": [1.5, 2, None, 4, 5], "t": [*"abcd", None],
                "yes": [True, False, None, True, True], "none": [None] * 5}  # fmt: skip
    index.add(unit(5), ids=names, metadata=metadata)
    write_clip_retrieval(index, tmp_path / "out")
    index.save(tmp_path / "index")
    merged = RetrievalIndex(model)
    merged.merge(index)
    for again in (
        read_clip_retrieval(tmp_path / "out", model),
        RetrievalIndex.load(tmp_path / "index", model),
        merged,
    ):
        assert [(type(name), name) for name in again.ids] == [(type(n), n) for n in names]
        assert again.columns == metadata
        assert again.search(unit(5)[1], k=1)[0].id == names[1]
        np.testing.assert_allclose(again.embeddings([names[2]])[0], unit(5)[2], atol=1e-6)
    table = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")  # as other programs read it
    assert table.column("image_path").to_pylist() == [str(name) for name in names[:2]]
    assert ("id_is_integer" in table.column_names) == any(isinstance(n, int) for n in names)


def test_columns_that_a_folder_cannot_hold(model, tmp_path, caplog):
    for metadata, error, match in (
        ({"a": [1, "x"]}, DataError, "'a' cannot be written as Parquet .it holds int and str"),
        ({"a": [True, 2]}, DataError, "holds bool and int"),
        ({"a": [2**70, 1]}, DataError, "'a' cannot be written"),
        ({"a": ["\udcff", "b"]}, DataError, "'a' cannot be written"),
        ({"image_path": ["x", "y"]}, ConfigError, "metadata column 'image_path'"),
    ):
        index = RetrievalIndex(model)
        index.add(unit(2), metadata=metadata)
        with pytest.raises(error, match=match):
            write_clip_retrieval(index, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_folder_without_metadata(model, tmp_path):
    """Running numbers over all partitions, in the order of their numbers and not of their names."""
    z = unit(11)
    (tmp_path / "text_emb").mkdir()
    for part in range(11):
        np.save(tmp_path / f"text_emb/text_emb_{part}.npy", z[part : part + 1])
    np.save(tmp_path / "text_emb/text_emb_old.npy", z)  # not a partition
    index = read_clip_retrieval(tmp_path, model, modality="text", dtype="float16")
    assert index.ids == tuple(range(11))
    assert index.dtype == "float16"
    np.testing.assert_allclose(index.embeddings(), z, atol=1e-3)


def test_bad_folders(model, tmp_path, make_model):
    index = RetrievalIndex(model)
    index.add(unit(5), ids=list("abcde"))
    write_clip_retrieval(index, tmp_path / "out")
    with pytest.raises(ConfigError, match="makes embeddings of 8"):
        read_clip_retrieval(tmp_path / "out", make_model(embed_dim=8))
    np.save(tmp_path / "out/img_emb/img_emb_0.npy", unit(4))
    with pytest.raises(CheckpointError, match="has 4 rows and column"):
        read_clip_retrieval(tmp_path / "out", model)
    np.save(tmp_path / "out/img_emb/img_emb_0.npy", unit(5)[0])
    with pytest.raises(ConfigError, match=r"has shape \(16,\)"):
        read_clip_retrieval(tmp_path / "out", model)
    (tmp_path / "out/img_emb/img_emb_0.npy").write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_clip_retrieval(tmp_path / "out", model)
    with pytest.raises(ConfigError, match="empty"):
        write_clip_retrieval(RetrievalIndex(model), tmp_path / "new")


def test_faiss(model):
    pytest.importorskip("faiss")
    index = RetrievalIndex(model)
    index.add(unit(200), metadata={"n": range(200)})
    queries = unit(3, seed=1)
    expected = index.search(queries, k=5)
    ids = [[hit.id for hit in hits] for hits in expected]
    index.search_with(faiss_search())
    assert [[hit.id for hit in hits] for hits in index.search(queries, k=5)] == ids
    kept = index.search(queries[0], k=5, where=lambda c: c["n"] < 50, min_score=0.1)
    assert kept
    assert all(hit.id < 50 and hit.score >= 0.1 for hit in kept)
    third = index.search(queries[0], k=5)[2].score  # itself is enough
    assert len(index.search(queries[0], k=5, min_score=third)) == 3
    assert len(index.search(queries[0], k=999)) == 200
    index.remove(ids[0][0])
    assert index.search(queries[0], k=4)[0].id == ids[0][1]
    for factory in ("IVF4,Flat", "HNSW16"):
        index.search_with(faiss_search(factory))
        assert all(h.id < 50 for h in index.search(queries[0], where=lambda c: c["n"] < 50))
    scores, positions = to_faiss(index).search(queries, 1)
    assert index.ids[positions[1, 0]] == ids[1][0]
    assert scores[1, 0] == pytest.approx(expected[1][0].score, abs=1e-6)
    with pytest.raises(ConfigError, match="faiss cannot build an index 'Nonsense'"):
        to_faiss(index, "Nonsense")


def clustered(n, d=32, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, d)) + 2 * rng.standard_normal((40, d))[rng.integers(0, 40, n)]
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("factory", "option", "most"),
    [
        ("IVF64,Flat", "nprobe", 64),
        ("HNSW16", "ef_search", 4000),
        ("PCA24,IVF64,Flat", "nprobe", 64),
    ],
)
def test_faiss_effort_is_chosen_by_recall(make_model, factory, option, most, caplog):
    pytest.importorskip("faiss")
    index = RetrievalIndex(make_model(embed_dim=32))
    index.add(clustered(4000), metadata={"n": range(4000)})
    queries = clustered(50, seed=1)
    exact = [{hit.id for hit in hits} for hits in index.search(queries, k=10)]
    assert index.recall(queries) == 1

    def recall():
        found = [{hit.id for hit in hits} for hits in index.search(queries, k=10)]
        return np.mean([len(a & b) / 10 for a, b in zip(exact, found, strict=True)])

    caplog.set_level("INFO", "vlm.heads.faiss_index")
    index.search_with(faiss_search(factory, **{option: 1}))
    least = recall()
    assert caplog.records[-1].levelname == "WARNING"
    assert index.recall(queries) == pytest.approx(least, abs=0.01)
    index.search_with(faiss_search(factory))
    if "PCA" not in factory:
        assert recall() > max(least, 0.85)
        assert caplog.records[-1].levelname == "INFO"
        assert "nearest rows, measured on 256 queries" in caplog.messages[-1]
        index.search_with(faiss_search(factory, **{option: most}))
        assert recall() >= 0.99
    # A filter does not bring faiss's own defaults back.
    half = index.search(queries, k=10, where=lambda c: c["n"] < 2000)
    assert all(len(hits) == 10 for hits in half)
    index.search_with(None)
    truth = index.search(queries, k=10, where=lambda c: c["n"] < 2000)
    same = [len({*a} & {*b}) / 10 for a, b in zip(map(ids, truth), map(ids, half), strict=True)]
    assert np.mean(same) > (0.3 if "PCA" in factory else 0.85)


def ids(hits):
    return [hit.id for hit in hits]


def test_faiss_options_must_fit(model):
    pytest.importorskip("faiss")
    index = RetrievalIndex(model)
    index.add(unit(500))
    for factory, options, match in (
        ("Flat", {"nprobe": 4}, "'Flat' has no nprobe"),
        ("HNSW16", {"nprobe": 4}, "has no nprobe"),
        ("IVF4,Flat", {"ef_search": 4}, "has no efSearch"),
        ("IVF4,Flat", {"nprobe": 0}, "needs a positive nprobe"),
        ("IVF1000,Flat", {}, "cannot build an index 'IVF1000,Flat' of 500 rows"),
    ):
        with pytest.raises(ConfigError, match=match):
            to_faiss(index, factory, **options)
    made = to_faiss(index, "IVF16,Flat", nprobe=5)
    import faiss

    assert faiss.extract_index_ivf(made).nprobe == 5


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        faiss_search()
