"""Indexes that anybody may have made: a corrupt one is an error of one sentence, and soon."""

import json
import struct
import time

import numpy as np
import pytest

from vlm.errors import CheckpointError
from vlm.heads import index_folder
from vlm.heads.exchange import read_clip_retrieval, write_clip_retrieval
from vlm.heads.retrieval import RetrievalIndex


@pytest.fixture
def folder(model, tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    index = RetrievalIndex(model, coding="binary")
    index.add(rows / np.linalg.norm(rows, axis=1, keepdims=True), ids=range(40))
    index.save(tmp_path / "index")
    index.remove([3])
    index.save(tmp_path / "index")
    return tmp_path / "index"


def refused(folder, model, message):
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as refusal:
        RetrievalIndex.load(folder, model)
    assert "\n" not in str(refusal.value)
    assert time.process_time() - start < 5


def npy(shape, descr="'<f4'", data=b""):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "O", "no valid 'dtype'"),
        ("dtype", ["float32"], "no valid 'dtype'"),
        ("removed", ["a"], "no valid 'dtype' or 'removed'"),
        ("removed", "/etc/passwd", "passwd cannot be read"),
        ("centre", ["a"] * 16, "no valid 'centre'"),
        ("centre", [0.5], "no valid 'centre'"),
        ("centre", None, "codes of an unknown kind"),
        ("coding", ["binary"], "codes of an unknown kind"),
        ("embed_dim", 10**400, "embedding widths differ|no valid 'centre'"),
        ("probe_text", [float("nan")] * 16, "no valid 'probe_text'"),
        ("probe_text", ["a"] * 16, "no valid 'probe_text'"),
        ("probe_image", [[]] * 16, "no valid 'probe_image'"),
        ("model", 7, "no valid 'model'"),
        ("facts", [1], "does not describe its model"),
        ("shards", [[]], "rows-None"),
        ("shards", [{"name": {"a": 1}, "count": "x"}], "cannot be read"),
        ("shards", [{"name": "../../x", "count": 1}], "rows-x.npy"),
        ("version", [2], "has version"),
        ("extra", [[]] * 4_100_000, "more than 4,000,000 values"),
    ],
)
def test_descriptions(folder, model, field, value, message):
    file = folder / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    refused(folder, model, message)


def test_a_description_with_nan_ends_too(folder, model):
    file = folder / "index.json"
    meta = json.loads(file.read_text()) | {"note": float("nan"), "dtype": "float16"}
    file.write_text(json.dumps(meta))
    refused(folder, model, "described as float16")


def test_deep_descriptions(folder, model):
    (folder / "index.json").write_text('{"a": ' + "[" * 100_000)
    refused(folder, model, "nested too deep|is not JSON")  # Python 3.13 reads on to the end
    assert index_folder.generation(folder) == "corrupt"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"ids": [[i] for i in range(40)]}, "no text and no number"),
        ({"ids": [{} for _ in range(40)]}, "more values than its rows have"),
        ({"ids": [i / 2 for i in range(40)]}, "no text and no number"),
        ({"ids": [None] * 40}, "no text and no number"),
        ({"ids": [i > 3 for i in range(40)]}, "no text and no number"),
        ('{"ids": [' + "9" * 5_000 + "]}", "is not JSON"),
        ({"ids": [7] * 40}, "duplicate ids"),
        ({"ids": list(range(40)), "columns": {"a": [[0]] * 40}}, "no text and no number"),
        ({"ids": list(range(40)), "columns": {"a": {"b": 1}}}, "more values|is corrupt"),
        ({"ids": list(range(40)), "columns": [1]}, "is corrupt"),
        ({"ids": list(range(40)), "columns": {"a": [0] * 1_000_000}}, "more values than its rows"),
        ({"ids": list(range(1_000_000))}, "more values than its rows"),
        ([], "is corrupt"),
    ],
)
def test_items(folder, model, items, message):
    (file,) = folder.glob("items-*.json")
    file.write_text(items if isinstance(items, str) else json.dumps(items))
    refused(folder, model, message)


def test_deep_items(folder, model):
    (file,) = folder.glob("items-*.json")
    file.write_text('{"ids": ' + "[" * 9_000)
    refused(folder, model, "nested too deep|is not JSON")  # Python 3.13 reads on to the end


def test_captions_may_have_any_characters(model, tmp_path):
    """Commas and brackets in texts do not count as values."""
    index = RetrievalIndex(model)
    rows = np.eye(16, dtype=np.float32)[:3]
    texts = ['[{,"\\' * 50_000, "a,b", ""]
    index.add(rows, ids=texts, metadata={"caption": texts})
    index.save(tmp_path / "index")
    assert RetrievalIndex.load(tmp_path / "index", model).ids == tuple(texts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (npy((40, 16)), "cannot be read"),  # without its data
        (npy((2**62, 2**62)), "cannot be read"),
        (npy((-1, 16)), "its shape is"),
        (npy("(" * 5_000), "cannot be read"),
        (npy((40, 16), "'O'"), "objects"),
        (npy((40, 16), "[('a', '<f4')]", bytes(2560)), "is corrupt"),
        (npy((1,) * 40), "its shape is"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1), "header is too long"),
    ],
)
@pytest.mark.parametrize("kind", ["rows", "codes", "removed"])
def test_arrays(folder, model, kind, data, message):
    (file,) = folder.glob(f"{kind}-*.npy")
    file.write_bytes(data)
    refused(folder, model, message if kind == "rows" else "")


def test_positions_of_removed_rows(folder, model):
    (file,) = folder.glob("removed-*.npy")
    for positions in ([-1], [40], list(range(41)), [0.5], [[1]]):
        np.save(file, np.asarray(positions))
        refused(folder, model, "invalid positions")


def test_codes_of_another_width(folder, model):
    (file,) = folder.glob("codes-*.npy")
    np.save(file, np.zeros((40, 1), np.uint8))
    refused(folder, model, "codes and rows differ")


def test_integer_ids_of_clip_retrieval_that_are_none(model, tmp_path):
    import pyarrow
    import pyarrow.parquet

    index = RetrievalIndex(model)
    index.add(np.eye(16, dtype=np.float32)[:3], ids=[1, 2, 3])
    write_clip_retrieval(index, tmp_path / "out")
    file = tmp_path / "out" / "metadata" / "metadata_0.parquet"
    columns = {"image_path": ["1", "two", "3"], "id_is_integer": [True] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    with pytest.raises(CheckpointError, match="'two' of row 1 is not an integer"):
        read_clip_retrieval(tmp_path / "out", model)
