"""Class folders have the labels and the order of torchvision's ImageFolder and of `datasets`."""

import csv
import os

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("datasets")

import datasets
import torchvision
from PIL import Image

from vlm.config import DataConfig
from vlm.data.image_folder import IMAGE, metadata_table
from vlm.data.sources import open_source, split_names

pytestmark = pytest.mark.peers

# Names whose order changes if whole paths are compared in place of folders.
CLASSES = ("cat", "cat 2", "cat-3", "Dog", "a_b", "n01440764", "Zebra", "ü")
FILES = ("1.png", "10.png", "2.PNG", "a.jpg", "B.JPEG")


def draw(root, classes=CLASSES, files=FILES):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i, file in enumerate(files):
            Image.new("RGB", (4, 4), (number, i, 0)).save(root / name / file)


def ours(root, split="train", **fields):
    config = DataConfig(str(root), label="label", captions=(), eval_split="test", **fields)
    source = open_source(config, split)
    return source.label_names, [
        (os.path.relpath(source[i]["image"], root), source[i]["label"]) for i in range(len(source))
    ]


def of_torchvision(root, below):
    found = torchvision.datasets.ImageFolder(str(root / below))
    rows = [(os.path.relpath(path, root), found.classes[i]) for path, i in found.samples]
    return found.classes, rows


def of_datasets(root, split="train"):
    found = datasets.load_dataset("imagefolder", data_dir=str(root), split=split)
    names = found.features["label"].names
    found = found.cast_column("image", datasets.Image(decode=False))
    return names, {(os.path.relpath(r["image"]["path"], root), names[r["label"]]) for r in found}


def test_class_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    root = tmp_path / "pets"
    draw(root)
    labels, rows = ours(root)
    assert (labels, rows) == of_torchvision(root, ".")
    assert (labels, set(rows)) == of_datasets(root)


@pytest.mark.parametrize("test", ["test", "testing", "eval", "evaluation"])
@pytest.mark.parametrize("train", ["train", "training"])
def test_split_folders(tmp_path, train, test):
    root = tmp_path / "pets"
    draw(root / train)
    draw(root / test, files=FILES[:2])
    for split, folder in (("train", train), ("test", test)):
        labels, rows = ours(root, split)
        assert (labels, rows) == of_torchvision(root, folder)
        assert (labels, set(rows)) == of_datasets(root, split)


def test_the_inner_of_nested_folders_is_the_class_as_in_datasets(tmp_path):
    root = tmp_path / "animals"
    draw(root / "mammals", ("cat", "dog"))
    draw(root / "birds", ("wren", "crow"))
    labels, rows = ours(root)
    assert (labels, set(rows)) == of_datasets(root)
    assert labels == ["cat", "crow", "dog", "wren"]


def test_metadata_of_an_imagefolder(tmp_path):
    root = tmp_path / "hf"
    for split, count in (("train", 4), ("test", 2)):
        (root / split).mkdir(parents=True)
        with open(root / split / "metadata.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["file_name", "label"])
            for i in range(count):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(root / split / f"{i}.png")
                writer.writerow([f"{i}.png", ("cat", "dog")[i % 2]])
    table = metadata_table(str(root))
    config = DataConfig(table, image=IMAGE, label="label", captions=())
    assert split_names(config) == ["test", "train"]
    for split in ("train", "test"):
        source = open_source(config, split)
        found = datasets.load_dataset("imagefolder", data_dir=str(root), split=split)
        found = found.cast_column("image", datasets.Image(decode=False))
        wanted = [(os.path.basename(r["image"]["path"]), r["label"]) for r in found]
        mine = [
            (os.path.basename(source[i][IMAGE]), source[i]["label"]) for i in range(len(source))
        ]
        assert mine == wanted
