"""Splits by name: all readers use the same aliases, and raise if a split is missing."""

import csv
import json
import tarfile

import pytest
from PIL import Image

from vlm.config import DataConfig
from vlm.data.array_record import serialize
from vlm.data.sources import open_source, open_to_measure, split_names
from vlm.data.splits import default_split, find_split, split_files
from vlm.errors import DataError


@pytest.mark.parametrize("asked", ["validation", "val", "valid", "dev"])
@pytest.mark.parametrize("there", ["validation", "val", "valid", "dev", "Val"])
def test_the_names_of_validation_are_one_split(asked, there):
    assert find_split(asked, ["train", there, "test"], "pets") == there


def test_an_exact_name_wins_and_several_others_are_refused():
    assert find_split("dev", ["val", "dev"], "pets") == "dev"
    with pytest.raises(DataError, match=r"pets has several splits .*'validation'.*dev, val"):
        find_split("validation", ["val", "dev"], "pets")
    with pytest.raises(DataError, match="pets has no split 'test': it has dev, val"):
        find_split("test", ["val", "dev"], "pets")


def test_the_split_to_measure_on():
    assert default_split(["train", "val", "test"], "pets") == "test"
    assert default_split(["train", "val"], "pets") == "val"
    assert default_split(["train"], "pets") == "train"  # all that there is
    with pytest.raises(DataError, match=r"neither a test nor a validation split.*extra, train"):
        default_split(["train", "extra"], "pets")


CLASSES, SPLITS = ("cat", "dog"), {"train": 3, "val": 2}


def rows():
    """(split, class, number) of all images."""
    return [(s, c, i) for s, count in SPLITS.items() for c in CLASSES for i in range(count)]


def lay_out(kind, root):
    """The same images with the same splits, in the layout of a reader; its source."""
    files = {}
    for s, c, i in rows():
        files[s, c, i] = root / "images" / s / c / f"{i}.png"
        files[s, c, i].parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (40 * i, 90, len(s))).save(files[s, c, i])
    if kind == "folder":
        return str(root / "images")
    if kind == "csv":
        with open(root / "captions.csv", "w", newline="") as f:
            csv.writer(f).writerows(
                [("image", "label", "split"), *((p, k[1], k[0]) for k, p in files.items())]
            )
        return str(root / "captions.csv")
    if kind in ("parquet", "parquet column", "arrow"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        def table(keys):
            return pyarrow.table(
                {
                    "image": [files[k].read_bytes() for k in keys],
                    "label": [k[1] for k in keys],
                    "split": [k[0] for k in keys],
                }
            )

        if kind == "parquet column":
            parquet.write_table(table(list(files)), root / "all.parquet")
            return str(root / "all.parquet")
        for s in SPLITS:
            keys = [k for k in files if k[0] == s]
            if kind == "parquet":
                parquet.write_table(table(keys).drop(["split"]), root / f"{s}-00000.parquet")
                continue
            (root / "saved" / s).mkdir(parents=True)
            with pyarrow.OSFile(str(root / "saved" / s / "data.arrow"), "wb") as f:
                data = table(keys)
                with pyarrow.ipc.new_stream(f, data.schema) as writer:
                    writer.write_table(data)
            state = {"_data_files": [{"filename": "data.arrow"}]}
            (root / "saved" / s / "state.json").write_text(json.dumps(state))
            (root / "saved" / s / "dataset_info.json").write_text("{}")
        if kind == "arrow":
            (root / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [*SPLITS]}))
            return str(root / "saved")
        return str(root / "{split}-*.parquet")
    for s in SPLITS:
        keys = [k for k in files if k[0] == s]
        if kind == "tar":
            with tarfile.open(root / f"{s}-000.tar", "w") as tar:
                for n, k in enumerate(keys):
                    tar.add(files[k], f"{n:03d}.png")
                    (root / "label").write_text(k[1])
                    tar.add(root / "label", f"{n:03d}.label")
        else:
            from array_record.python.array_record_module import ArrayRecordWriter

            writer = ArrayRecordWriter(str(root / f"{s}-000.array_record"), "group_size:1")
            for k in keys:
                writer.write(serialize({"image": files[k].read_bytes(), "label": k[1]}))
            writer.close()
    return str(root / ("{split}-{000..000}.tar" if kind == "tar" else "{split}-*.array_record"))


@pytest.mark.parametrize(
    "kind", ["folder", "csv", "parquet", "parquet column", "arrow", "tar", "array_record"]
)
def test_every_reader_knows_the_same_splits(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    source = lay_out(kind, tmp_path)
    config = DataConfig(source, label="label", captions=(), access="random")
    assert split_names(config) == ["train", "val"]
    labels = {}
    for asked in ("train", "val", "validation", "valid", "dev"):
        opened = open_source(config, asked)
        labels[asked] = [opened[i]["label"] for i in range(len(opened))]
    assert sorted(labels["train"]) == ["cat"] * 3 + ["dog"] * 3
    for name in ("val", "validation", "valid", "dev"):
        assert sorted(labels[name]) == ["cat"] * 2 + ["dog"] * 2
    for gone in ("test", "holdout"):
        with pytest.raises(DataError, match=f"no split '{gone}': it has train, val"):
            open_source(config, gone)
    measured, name = open_to_measure(config, None)
    assert (len(measured), name) == (4, "val")
    with pytest.raises(DataError, match="no split 'test': it has train, val"):
        open_to_measure(config, "test")


def test_a_folder_without_splits_is_one_whole(tmp_path):
    for name in ("cat", "dog", "train"):  # the last is a class: it has no folders inside
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    config = DataConfig(str(tmp_path), label="label", captions=())
    assert split_names(config) is None
    assert len(open_source(config, "train")) == 3
    opened, name = open_to_measure(config, None)
    assert (len(opened), name) == (3, "all")
    for asked in ("test", "val"):
        with pytest.raises(DataError, match=f"no split '{asked}'"):
            open_to_measure(config, asked)


def test_the_classes_are_those_of_all_splits(tmp_path):
    for path in ("train/cat", "train/dog", "train/fox", "val/dog"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path / "1.png")
    config = DataConfig(str(tmp_path), label="label", captions=())
    for split in ("train", "val"):
        assert open_source(config, split).label_names == ["cat", "dog", "fox"]


def test_files_of_several_splits_need_a_place_for_its_name(tmp_path):
    for name in ("train-00000.parquet", "train-00001.parquet"):
        (tmp_path / name).write_bytes(b"")
    pattern = str(tmp_path / "*.parquet")
    assert len(split_files(pattern, "train", "train")) == 2
    (tmp_path / "test-00000.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"several splits \(test, train\): put {split}"):
        split_files(pattern, "train", "train")
