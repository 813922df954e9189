"""Changes of an index: remove, update, merge, metadata; and the files of a save."""

import json
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from vlm.errors import CheckpointError, ConfigError, ConflictError
from vlm.heads import index_folder, items
from vlm.heads.model_identity import identity
from vlm.heads.retrieval import RetrievalIndex


def unit(n, d=16, seed=0):
    z = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.fixture
def index(model):
    index = RetrievalIndex(model)
    index.add(unit(40), ids=range(40), metadata={"year": [2000 + i for i in range(40)]})
    return index


def ids(hits):
    return [hit.id for hit in hits]


# ------------------------------------------------------------------------- removing and changing


def test_removed_items_are_not_found(index, tmp_path):
    z = unit(40)
    index.remove([3, 7])
    index.remove(11)
    assert len(index) == 37
    assert 3 not in index
    assert 4 in index
    left = [i for i in range(40) if i not in (3, 7, 11)]
    assert index.ids == tuple(left)
    assert ids(index.search(z[3], k=99)) == [left[i] for i in np.argsort(-(z[left] @ z[3]))]
    with pytest.raises(ConfigError, match="no id 3"):
        index.remove([5, 3])
    assert 5 in index  # none at all
    index.save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index", index.model)
    assert loaded.ids == tuple(left)
    loaded.remove(0)
    loaded.save(tmp_path / "index")  # few: the shard is kept, and a small file lists removed rows
    again = RetrievalIndex.load(tmp_path / "index", index.model)
    assert again.ids == tuple(left[1:])
    assert any(path.name.startswith("removed-") for path in (tmp_path / "index").iterdir())
    np.testing.assert_allclose(again.embeddings(), z[left[1:]], atol=1e-7)


def test_many_removed_rows_are_dropped_by_a_save(index, tmp_path):
    index.save(tmp_path / "index")
    index.remove(range(20))
    index.save(tmp_path / "index")
    rows = [p for p in (tmp_path / "index").iterdir() if p.name.startswith("rows-")]
    assert [len(np.load(p)) for p in rows] == [20]
    assert index.ids == RetrievalIndex.load(tmp_path / "index", index.model).ids
    assert index.metadata(30) == {"year": 2030}
    assert index.search(unit(40)[25], k=1)[0].id == 25


def test_columns_keep_their_order(model, tmp_path):
    index, names = RetrievalIndex(model), list("zebra")
    index.add(unit(2), metadata={name: [1, 2] for name in names})
    index.save(tmp_path / "index")
    assert list(RetrievalIndex.load(tmp_path / "index", model).columns) == names


def test_update_replaces_and_adds(index):
    z = unit(3, seed=9)
    index.update(z, ids=[5, 6, "new"], metadata={"year": [1, 2, 3]})
    assert len(index) == 41
    assert [index.search(row, k=1)[0].id for row in z] == [5, 6, "new"]
    assert index.metadata(5) == {"year": 1}
    assert index.search(unit(40)[5], k=1)[0].score < 0.999  # the old one is replaced
    with pytest.raises(ConfigError, match="id 5 is in the index already"):
        index.update(z[:2], ids=[5, 5])
    with pytest.raises(ConfigError, match="or call `update`"):
        index.add(z[:1], ids=[5])


def test_update_keeps_the_metadata_that_it_does_not_name(index):
    index.add(unit(1, seed=2), ids=["a"], metadata={"camera": ["X100"], "year": [1999]})
    index.update(unit(1, seed=3), ids=["a"])
    assert index.metadata("a") == {"camera": "X100", "year": 1999}
    index.update(unit(2, seed=4), ids=["a", "b"], metadata={"year": [2001, 2002], "new": [1, 2]})
    assert index.metadata("a") == {"camera": "X100", "year": 2001, "new": 1}
    assert index.metadata("b") == {"camera": None, "year": 2002, "new": 2}
    index.update(unit(1, seed=5), ids=["a"], metadata={"camera": [None]})
    assert index.metadata("a") == {"camera": None, "year": 2001, "new": 1}


def test_running_numbers_never_repeat_old_ids(index):
    index.remove([0, 1])
    index.add(unit(2, seed=3))
    assert index.ids[-2:] == (40, 41)


def test_merge(index, model, make_model):
    other = RetrievalIndex(make_model())
    other.add(unit(3, seed=5), ids=["a", "b", 7], metadata={"camera": ["x", None, "y"]})
    with pytest.raises(ConfigError, match="id 7 is in both"):
        index.merge(other)
    assert len(index) == 40
    index.merge(other, replace=True)
    assert len(index) == 42
    assert index.metadata("a") == {"year": None, "camera": "x"}
    assert index.search(unit(3, seed=5)[2], k=1)[0].id == 7
    index.merge(index)  # which it has already
    index.merge(RetrievalIndex(make_model()))
    assert len(index) == 42
    stranger = RetrievalIndex(make_model(seed=1))
    with pytest.raises(CheckpointError, match="embeds differently"):
        index.merge(stranger)


# ------------------------------------------------------------------------------------- filters


@pytest.mark.untyped
def test_filters(index):
    z = unit(40)
    index.add(unit(2, seed=4), ids=["p", "q"], metadata={"camera": ["X100", None]})
    assert ids(index.search(z[0], k=9, where={"year": 2003})) == [3]
    assert sorted(ids(index.search(z[0], k=9, where={"year": [2003, 2005]}))) == [3, 5]
    late = index.search(z[0], k=9, where=lambda c: c["year"] >= 2035)
    assert sorted(ids(late)) == [35, 36, 37, 38, 39]
    assert ids(index.search(z[0], k=9, where={"camera": "X100"})) == ["p"]
    assert ids(index.search(z[0], k=9, where=lambda c: c["camera"] == "X100")) == ["p"]
    assert index.search(z[0], where={"year": 1999}) == []  # nothing matches: no hits, no error
    assert index.search([z[0], z[1]], where={"year": 1999}) == [[], []]
    with pytest.raises(ConfigError, match="no metadata column 'lens'; it has camera, year"):
        index.search(z[0], where={"lens": 1})
    with pytest.raises(ConfigError, match="no metadata column 'lens'"):
        index.search(z[0], where=lambda c: c["lens"] == 1)
    with pytest.raises(ConfigError, match="a bool for each of the 42 rows"):
        index.search(z[0], where=lambda c: c["year"])
    with pytest.raises(ConfigError, match="where is a str"):
        index.search(z[0], where="year > 3")


def test_a_filtered_search_equals_a_search_of_the_filtered_rows(model):
    """Sparse and dense filters use different code paths."""
    z = unit(3000, seed=1)
    index = RetrievalIndex(model)
    index.add(z, metadata={"n": range(3000)})
    for keep in (2, 40, 900, 2999):
        hits = index.search(z[5], k=10, where=lambda c, keep=keep: c["n"] % 3000 < keep)
        np.testing.assert_array_equal(ids(hits), np.argsort(-(z[:keep] @ z[5]))[:10])


@pytest.mark.untyped
def test_bad_metadata(index):
    for metadata, match in (
        ({"year": [1]}, "has 1 values for 2 items"),
        ({"year": [1, [2]]}, r"holds \[2\]"),
        ({"year": "ab"}, "must be a name with a list"),
        ({"": [1, 2]}, "must be a name with a list"),
        ({3: [1, 2]}, "must be a name with a list"),
    ):
        with pytest.raises(ConfigError, match=match):
            index.add(unit(2, seed=8), ids=["a", "b"], metadata=metadata)
    assert len(index) == 40


def test_arrays_that_a_filter_gets(model):
    """Numbers, with NaN for missing values; texts; and mixed columns as objects."""
    index = RetrievalIndex(model)
    columns = {
        "whole": [1, 2, 3], "gaps": [1, None, 3], "yes": [True, False, True],
        "text": ["a", None, "c"], "both": ["a", 1, None], "none": [None] * 3,
        "scalar": np.array([1.5, 2.5, 3.5]),
    }  # fmt: skip
    index.add(unit(3), metadata=columns)
    seen = {}
    index.search(unit(1), where=lambda c: seen.update(c) or c["yes"])
    kinds = {name: column.dtype.kind for name, column in seen.items()}
    assert kinds == {
        "whole": "i", "gaps": "f", "yes": "b", "text": "U", "both": "O", "none": "f", "scalar": "f"
    }  # fmt: skip
    np.testing.assert_array_equal(seen["gaps"], [1, np.nan, 3])
    assert seen["text"].tolist() == ["a", "", "c"]
    assert seen["both"].tolist() == columns["both"]
    assert index.metadata(1)["scalar"] == 2.5
    assert ids(index.search(unit(3)[1], where={"text": None})) == [1]
    assert ids(index.search(unit(3)[1], where={"whole": {2, 3}, "yes": True})) == [2]


def test_least_score_and_probability(index):
    z = unit(40)
    cosines = z @ z[0]
    least = float(np.sort(cosines)[-4])
    assert len(index.search(z[0], k=40, min_score=least)) == 4
    assert index.search(z[0], k=40, min_score=1.5) == []
    with pytest.raises(ConfigError, match="no probability of a single pair"):
        index.search(z[0], min_probability=0.5)
    index.model.loss, index.model.logit_bias = "sigmoid", -10.0
    expected = (1 / (1 + np.exp(10 - 50 * cosines)) >= 0.5).sum()
    assert len(index.search(z[0], k=40, min_probability=0.5)) == expected
    for bad in (2, 0, 1, -1):
        with pytest.raises(ConfigError, match=f"min_probability is {bad}"):
            index.search(z[0], min_probability=bad)
    with pytest.raises(ConfigError, match="and no min_score"):
        index.search(z[0], min_probability=0.5, min_score=0.5)


def test_more_like_these(index):
    z = unit(40)
    hits = index.like([3, 4], k=38)
    assert len(hits) == 38
    assert not {3, 4} & set(ids(hits))
    mean = z[3] + z[4]
    rest = [i for i in range(40) if i not in (3, 4)]
    assert ids(hits) == [rest[i] for i in np.argsort(-(z[rest] @ mean))]
    assert ids(index.like(3, k=2, where={"year": 2009})) == [9]
    with pytest.raises(ConfigError, match="no id 99"):
        index.like(99)
    assert len(index.like(3)) == 5
    assert len(index.like(3, k=1)) == 1
    with pytest.raises(ConfigError, match="k is 0"):
        index.like(3, k=0)
    with pytest.raises(ConfigError, match="no ids"):
        index.like([])


# --------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(("coding", "least"), [("int8", 0.99), ("binary", 0.95)])
def test_codes_find_nearly_all_and_score_exactly(model, coding, least, tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 64))
    z = centres[rng.integers(0, 40, 5000)] + 0.5 * rng.standard_normal((5000, 64))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    exact, coded = RetrievalIndex(model), RetrievalIndex(model, coding=coding)
    for i in (exact, coded):
        i.add(z)
    queries = z[rng.integers(0, 5000, 50)] + 0.1 * rng.standard_normal((50, 64)).astype(np.float32)
    truth, found = exact.search(queries, k=10), coded.search(queries, k=10)
    hits = [len({*ids(a)} & {*ids(b)}) for a, b in zip(truth, found, strict=True)]
    assert np.mean(hits) / 10 >= least
    scores = {h.id: h.score for h in truth[0]}
    for hit in found[0]:
        assert hit.score == pytest.approx(scores.get(hit.id, hit.score), abs=1e-6)
    codes = sum(c.values.nbytes for c in coded._items.codes)
    assert codes * (4 if coding == "int8" else 32) == z.nbytes
    only = coded.search(z[7], k=5, where=None, min_score=0.9)
    assert all(hit.score >= 0.9 for hit in only)


@pytest.mark.parametrize("coding", ["int8", "binary"])
def test_codes_are_saved_filtered_and_removed_from(model, coding, tmp_path):
    index = RetrievalIndex(model, coding=coding)
    index.add(unit(300), metadata={"n": range(300)})
    index.save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index", model)
    assert loaded.coding == coding
    assert isinstance(loaded._items.rows[0], np.memmap)  # memory holds the codes
    loaded.add(unit(10, seed=2))
    loaded.remove(0)
    assert loaded.search(unit(300)[0], k=400)[0].id != 0
    assert ids(loaded.search(unit(300)[9], k=3, where={"n": 9})) == [9]
    loaded.save(tmp_path / "index")
    again = RetrievalIndex.load(tmp_path / "index", model)
    assert again.search(unit(10, seed=2)[4], k=1)[0].id == 304


# -------------------------------------------------------------------------------- the folder


def test_an_index_of_the_first_format_opens(model, tmp_path):
    z = unit(5)
    np.save(tmp_path / "embeddings-1.npy", z)
    meta = {"format": "vlm retrieval index", "version": 1, "embed_dim": 16, "dtype": "float32"}
    meta |= {"count": 5, "embeddings": "embeddings-1.npy", "ids": list("abcde")}
    (tmp_path / "index.json").write_text(json.dumps(meta | identity(model)))
    index = RetrievalIndex.load(tmp_path, model)
    assert index.search(z[2], k=1)[0].id == "c"
    index.save(tmp_path)
    assert not (tmp_path / "embeddings-1.npy").exists()
    assert RetrievalIndex.load(tmp_path, model).ids == tuple("abcde")


def test_many_shards_are_rewritten(model, tmp_path, monkeypatch):
    monkeypatch.setattr(items, "MOST_SHARDS", 3)
    monkeypatch.setattr(index_folder, "SHARD_ROWS", 8)
    index = RetrievalIndex(model)
    for i in range(6):
        index.add(unit(2, seed=i), ids=[2 * i, 2 * i + 1])
        index.save(tmp_path / "index")
    rows = sorted(len(np.load(p)) for p in (tmp_path / "index").glob("rows-*"))
    assert sum(rows) == 12
    assert len(rows) <= 4
    assert RetrievalIndex.load(tmp_path / "index", model).ids == tuple(range(12))


WRITER = """
    import sys
    import numpy as np
    from vlm.heads.retrieval import RetrievalIndex

    class Model:
        name, loss, logit_scale, logit_bias = "m", "softmax", 10.0, 0.0
        def encode_text(self, texts): return np.eye(self.d, dtype=np.float32)[: len(texts)]
        encode_image, d = encode_text, 64

    folder = sys.argv[1]
    def rows(seed):
        z = np.random.default_rng(seed).standard_normal((100_000, 64)).astype(np.float32)
        return z / np.linalg.norm(z, axis=1, keepdims=True)
"""


def script(body):
    return textwrap.dedent(WRITER) + textwrap.dedent(body)


def run(body, folder, **options):
    return subprocess.Popen(
        [sys.executable, "-c", script(body), str(folder)],
        stdout=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("seconds", [0.0, 0.03, 0.12])
def test_a_kill_while_adding_and_saving_leaves_the_old_or_the_new_index(seconds, tmp_path):
    body = """
        try: index = RetrievalIndex.load(folder, Model())
        except Exception: index = RetrievalIndex(Model())
        first = len(index)
        if not first:
            index.add(rows(0)); index.save(folder)
        print("ready", flush=True)
        index.add(rows(1), ids=range(100_000, 200_000))
        print("added", flush=True)
        index.save(folder)
        print("saved", flush=True)
    """
    process = run(body, tmp_path / "index")
    assert process.stdout.readline() == "ready\n"
    if seconds:
        process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()

    class Model:
        name, loss, logit_scale, logit_bias = "m", "softmax", 10.0, 0.0

        def encode_text(self, texts):
            return np.eye(64, dtype=np.float32)[: len(texts)]

        encode_image = encode_text

    loaded = RetrievalIndex.load(tmp_path / "index", Model())
    assert len(loaded) in (100_000, 200_000)
    assert loaded.ids == tuple(range(len(loaded)))
    loaded.save(tmp_path / "index")  # leftover files are deleted
    names = [p.name.split("-")[0] for p in (tmp_path / "index").iterdir()]
    assert names.count("rows") == len(loaded) // 100_000


def test_the_second_of_two_savers_is_refused_and_reloads(index, tmp_path):
    """Load, load, save, save: the second save keeps what the first one wrote."""
    folder = tmp_path / "index"
    index.save(folder)
    one, two = (RetrievalIndex.load(folder, index.model) for _ in range(2))
    one.add(unit(2, seed=1), ids=["a", "b"], metadata={"camera": ["X", "Y"]})
    one.update(unit(1, seed=2), ids=[5])
    one.remove([7, 8])
    one.save(folder)
    two.add(unit(1, seed=3), ids=["c"], metadata={"lens": ["L"]})
    two.update(unit(1, seed=4), ids=[6], metadata={"year": [1]})
    two.remove([8, 9])
    with pytest.raises(ConflictError, match=r"another process saved to .*: call reload\(\)"):
        two.save(folder)
    assert "c" in two
    assert RetrievalIndex.load(folder, index.model).ids == one.ids
    two.reload()
    two.save(folder)
    both = RetrievalIndex.load(folder, index.model)
    assert set(both.ids) == {*range(40), "a", "b", "c"} - {7, 8, 9}
    for z, name in ((unit(1, seed=2), 5), (unit(1, seed=4), 6), (unit(1, seed=3), "c")):
        assert both.search(z[0], k=1)[0] == (name, pytest.approx(1, abs=1e-6))
    assert both.metadata("a") == {"year": None, "camera": "X", "lens": None}
    assert both.metadata("c") == {"year": None, "camera": None, "lens": "L"}
    assert both.metadata(6)["year"] == 1
    with pytest.raises(ConflictError):
        one.save(folder)


def test_an_index_is_replaced_only_with_overwrite(index, tmp_path):
    folder = tmp_path / "index"
    index.save(folder)
    index.save(tmp_path / "copy")
    index.save(folder)  # it is still the one that was saved there
    other = RetrievalIndex(index.model)
    other.add(unit(1), ids=["a"])
    with pytest.raises(ConflictError, match="that this one was not loaded from"):
        other.save(folder)
    with pytest.raises(ConfigError, match="no folder to read again"):
        other.reload()
    assert len(RetrievalIndex.load(folder, index.model)) == 40
    (folder / "rows-mine.npy").write_text("precious")
    other.save(folder, overwrite=True)
    assert RetrievalIndex.load(folder, index.model).ids == ("a",)
    assert (folder / "rows-mine.npy").read_text() == "precious"
    with pytest.raises(ConflictError, match="call reload"):
        index.save(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ConflictError, match="call reload"):
        other.save(folder)
    other.save(folder, overwrite=True)
    assert len(RetrievalIndex.load(folder, index.model)) == 1


def test_a_first_save_that_was_killed_blocks_no_second_one(index, tmp_path):
    (tmp_path / "rows-0123456789ab.npy").write_bytes(b"half")
    (tmp_path / "index.lock").write_text("process 1 on nowhere")
    index.save(tmp_path)
    assert len(RetrievalIndex.load(tmp_path, index.model)) == 40
    assert not (tmp_path / "rows-0123456789ab.npy").exists()


def test_a_save_waits_for_the_lock_and_names_its_owner(index, tmp_path, monkeypatch):
    monkeypatch.setattr(index_folder, "LOCK_TIMEOUT", 0.1)
    index.save(tmp_path)
    busy = pytest.raises(ConflictError, match=r"process \d+ on .* has been saving")
    with index_folder.writing(tmp_path), busy:
        index.save(tmp_path)
    index.save(tmp_path)


def test_a_save_that_fails_leaves_its_items_unsaved(index, tmp_path, monkeypatch):
    index.save(tmp_path)
    index.add(unit(1, seed=1), ids=["new"])
    index.remove(range(20))  # enough to rewrite all shards

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_folder.os, "replace", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        index.save(tmp_path)
    monkeypatch.undo()
    index.reload()
    assert index.ids == (*range(20, 40), "new")
    index.save(tmp_path)
    assert RetrievalIndex.load(tmp_path, index.model).ids == index.ids


def test_a_bucket_is_refused(index):
    for act in (index.save, lambda folder: RetrievalIndex.load(folder, index.model)):
        with pytest.raises(ConfigError, match="gs://bucket/index is a bucket"):
            act("gs://bucket/index")


def test_a_searcher_follows_the_rows_that_a_save_moved(index, tmp_path):
    """A save that drops removed rows renumbers the remaining ones."""

    class First:
        def __init__(self, rows):
            self.z = np.concatenate(rows)

        def search(self, z_query, k, allowed, min_score):
            scores = z_query @ self.z.T
            if allowed is not None:
                scores = np.where(allowed, scores, -2)
            order = np.argsort(-scores, axis=1)[:, :k]
            return list(order), list(np.take_along_axis(scores, order, 1))

    index.search_with(First)
    index.search(unit(40)[30], k=1)
    index.save(tmp_path)
    index.remove(range(20))
    index.save(tmp_path)
    assert index.search(unit(40)[30], k=1)[0].id == 30


def test_killed_writers_lose_no_saved_items():
    """Small; the figures of `python tests/heads/index_writers.py` are of 2,000 saves."""
    script = pathlib.Path(__file__).with_name("index_writers.py")
    done = subprocess.run(
        [sys.executable, script, "--saves", "40"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_index_larger_than_its_memory(tmp_path):
    """139 MB of rows, built and searched with 64 MB beyond the imports and JAX's own start."""
    body = """
        import jax, os, resource
        jax.devices()  # its threads: an index notes the platform of its embeddings
        warm = np.ones((600, 600), np.float32) @ np.ones((600, 600), np.float32)
        Model.d = 512
        index = RetrievalIndex(Model())
        used = int(open("/proc/self/statm").read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)
        rng = np.random.default_rng(0)
        for part in range(17):
            index.add(rng.standard_normal((4096, 512), np.float32))
            index.save(folder)
        z = index.embeddings([7, 69_631])
        print([hits[0].id for hits in index.search(z, k=3)])
    """
    process = run(body, tmp_path / "index", stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert out.startswith("[7, 69631]"), err[-800:]
    rows = sum(p.stat().st_size for p in (tmp_path / "index").glob("rows-*"))
    assert rows > 2 * (64 << 20)
