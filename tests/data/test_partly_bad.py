"""Random access to sources where some examples are broken or incomplete: counted, and no end."""

import kinds
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from kinds import PREPROCESS, TOKENIZER, jpeg

from vlm.config import DataConfig, FieldFilter
from vlm.data.array_record import serialize
from vlm.data.examples import label_of
from vlm.data.faults import BadSample
from vlm.data.pipeline import train_batches
from vlm.data.sources import classes_of, open_source, vocabulary_texts
from vlm.errors import DataError

ENGLISH = (FieldFilter("language", one_of=("en",)),)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


def tar(folder, changed, count=12):
    """A tar of examples, some with other members than usual."""
    members = [m for n in range(count) for m in changed.get(n) or kinds.members(n)]
    kinds.write_tar(folder / "a.tar", members)
    return str(folder / "a.tar")


def counted(config, steps=8):
    iterator = train_batches(config, PREPROCESS, TOKENIZER, batch_size=4, seed=0)
    for _ in range(steps):
        next(iterator)
    return iterator.bad


@pytest.mark.parametrize("broken", [0, 5])
def test_one_broken_json_does_not_end_a_filtered_run(tmp_path, broken):
    changed = {broken: [*kinds.members(broken)[:2], (f"{broken:06d}.json", b"{")]}
    config = DataConfig(tar(tmp_path, changed), filters=ENGLISH, eval_split=None, max_bad_share=1.0)
    assert len(open_source(config, "train")) == len({1, 3, 5, 7, 9, 11, broken})
    bad = counted(config)
    assert set(bad.kinds) == {"broken text"}
    assert bad.kinds["broken text"] > 0


def test_class_names_pass_over_what_cannot_be_read(tmp_path):
    changed = {
        n: [(f"{n:06d}.jpg", jpeg(n)), (f"{n:06d}.json", text)]
        for n, text in {
            0: b"{",
            3: b"{}",
            4: b'{"language": null}',
            5: b'{"language": ["fr"]}',
        }.items()
    }
    source = tar(tmp_path, changed)
    config = DataConfig(source, label="language", eval_split=None)
    assert classes_of(config).labels == ["de", "en", "fr"]


@pytest.mark.parametrize("first", [b"{}", b'{"caption": null}', b"{"])
def test_the_first_example_may_lack_a_caption(tmp_path, first):
    changed = {0: [("000000.jpg", jpeg(0)), ("000000.json", first)]}
    config = DataConfig(tar(tmp_path, changed), eval_split=None, max_bad_share=1.0)
    source = open_source(config, "train")
    assert source[1]["caption"] == "picture 1"
    assert vocabulary_texts(config) == [f"picture {n}" for n in range(1, 12)]
    assert counted(config).kinds.total() > 0
    with pytest.raises(DataError, match="has no feature 'title'"):
        open_source(DataConfig(config.source, captions=("caption", "title")), "train")


@pytest.mark.parametrize("first", [serialize({"image": jpeg(0)}), b"no record"])
def test_the_first_record_may_lack_a_caption(tmp_path, first):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (first, serialize({"image": jpeg(1), "caption": "picture 1"})):
        writer.write(record)
    writer.close()
    config = DataConfig(str(tmp_path / "a.array_record"))
    assert open_source(config, "train")[1]["caption"] == "picture 1"
    with pytest.raises(DataError, match="no feature 'title'"):
        open_source(DataConfig(config.source, captions=("title",)), "train")


def test_a_filter_keeps_what_a_source_tells_of_itself(tmp_path):
    kinds.tars(tmp_path)
    (tmp_path / "003.tar").unlink()
    pattern = str(tmp_path / "{000..005}.tar")
    faults = open_source(DataConfig(pattern), "train").faults
    assert [fault["kind"] for fault in faults] == ["missing shard"]
    assert open_source(DataConfig(pattern, filters=ENGLISH), "train").faults == faults


def test_a_damaged_row_group_is_one_bad_sample(tmp_path):
    config = kinds.parquet_bytes(tmp_path)
    metadata = pyarrow.parquet.read_metadata(tmp_path / "0.parquet")
    place = metadata.row_group(1).column(0).data_page_offset
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    data[place : place + 60] = bytes(60)
    (tmp_path / "0.parquet").write_bytes(data)
    source = open_source(config, "train")
    for index in range(len(source)):
        if index in (3, 4, 5):
            with pytest.raises(BadSample, match="row group 1 of") as bad:
                source[index]
            assert bad.value.kind == "failed read"
        else:
            assert source[index]["caption"] == f"picture {index}"


def test_labels_have_one_spelling(tmp_path):
    """2, 2.0 (a column that pandas widened for a missing value) and "2" are one class."""
    for name, labels, expected in [
        ("whole", [2, 10, None], ["2", "10"]),
        ("floats", [2.0, 10.0, float("nan")], ["2", "10"]),
        ("texts", ["2", "10", ""], ["2", "10"]),
        ("truths", [False, True, None], ["False", "True"]),
    ]:
        rows = [{"image": f"{i}.jpg", "label": label} for i, label in enumerate(labels)]
        path = str(tmp_path / f"{name}.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        config = DataConfig(path, label="label", eval_split=None)
        source = open_source(config, "train")
        assert [label_of(source[i], config) for i in range(2)] == expected
        with pytest.raises(BadSample, match="has no label in label"):
            label_of(source[2], config)


def test_a_row_is_named_by_its_place_in_the_file(tmp_path):
    source = open_source(kinds.parquet_bytes(tmp_path), "train")  # row groups of three
    sizes = np.array_split(np.arange(kinds.COUNT), kinds.SHARDS)
    assert source[int(sizes[1][4])]["\0where"].endswith("1.parquet: row 4")


def test_rows_of_a_parquet_file_without_a_split_are_left_out_and_counted(tmp_path, caplog):
    """Also where one of the files has no such column: the rows of the others keep their numbers."""
    for name, rows in {
        "a": [{"image": "a0", "caption": "a0"}, {"image": "a1", "caption": "a1"}],
        "b": [{"image": f"b{i}", "caption": f"b{i}", "split": split}
              for i, split in enumerate(["test", "train", None])],
        "c": [{"image": f"c{i}", "caption": f"c{i}", "split": split}
              for i, split in enumerate([1.0, float("nan")])],
    }.items():  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    pattern = str(tmp_path / "*.parquet")
    for split, expected in (("train", ["b1"]), ("test", ["b0"]), ("1.0", ["c0"])):
        source = open_source(DataConfig(pattern), split)
        assert [source[i]["caption"] for i in range(len(source))] == expected
    assert "4 rows of no split" in caplog.text
    with pytest.raises(DataError, match=r"no split 'dev': it has 1\.0, test, train"):
        open_source(DataConfig(pattern), "dev")
    with pytest.raises(DataError, match="there is no table"):
        open_source(DataConfig(str(tmp_path / "none.parquet")), "train")
