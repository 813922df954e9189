"""`vlm data prepare --format clip_benchmark`: folders that evaluations read from a bucket."""

import json
import os
import tarfile

import pytest
from PIL import Image

from vlm.cli import main
from vlm.config import DataConfig
from vlm.data.shard_index import beside
from vlm.data.sources import classes_of, open_source
from vlm.evaluation.presets import coco, imagenet

IDS = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}


@pytest.fixture
def classes(tmp_path):
    """ImageNet's folders: three classes, two images each, one of them broken."""
    root = tmp_path / "imagenet"
    for number, label in enumerate(IDS):
        for i in range(2):
            folder = root / "val" / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * number, 80 * i, 0)).save(folder / f"{i}.png")
    (root / "val" / "n01440764" / "1.png").write_bytes(b"broken")
    return root


def prepare(*arguments) -> int:
    return main(["data", "prepare", *map(str, arguments), "--format", "clip_benchmark"])


def test_class_folders_become_a_folder_with_class_names(classes, tmp_path, capsys):
    out = tmp_path / "evals" / "imagenet1k"
    line = (classes, out, "--split", "val", "--label", "label", "--examples", "2")
    assert prepare(*line) == 0
    assert "5 examples in 3 shards" in capsys.readouterr().out
    assert (out / "classnames.txt").read_text().splitlines() == [*IDS.values()]
    assert (out / "dataset_type.txt").read_text() == "classification\n"
    templates = (out / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert len(templates) == 80
    assert all("{c}" in template for template in templates)
    assert (out / "val" / "nshards.txt").read_text() == "3\n"
    with tarfile.open(out / "val" / "0.tar") as tar:
        assert sorted(name.split(".")[1] for name in tar.getnames()) == ["cls", "cls", "png", "png"]

    config = DataConfig(f"wds:{out}", label="label", eval_split="val")
    source = open_source(config, "val")
    found = sorted((source[i]["label"], source[i]["image"]) for i in range(5))
    kept = [p for p in sorted(classes.rglob("*.png")) if p.read_bytes() != b"broken"]
    assert found == sorted((IDS[p.parent.name], p.read_bytes()) for p in kept)
    assert classes_of(config, source).names == [*IDS.values()]
    assert prepare(*line) == 0  # again: nothing is done twice
    shards = [f"{out}/val/{i}.tar" for i in range(3)]
    assert os.path.exists(beside(shards))


def test_captions_keep_all_lines(tmp_path):
    images = []
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        sentences = [{"raw": f"a picture {i},\nnumber {k}"} for k in range(5)]
        split = "train" if i == 1 else "test"
        images.append({"filename": f"{i}.png", "split": split, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    out = tmp_path / "evals"
    assert prepare(tmp_path / "dataset_coco.json", out, "--split", "test") == 0
    source = open_source(DataConfig(f"wds:{out}", eval_split="test"), "test")
    assert len(source) == 2
    assert source[1]["caption"] == [f"a picture 2, number {k}" for k in range(5)]
    assert not (out / "classnames.txt").exists()
    again = tmp_path / "again"  # from a folder in this layout: the same bytes
    assert prepare(f"wds:{out}", again, "--split", "test") == 0
    assert (again / "test" / "0.tar").read_bytes() == (out / "test" / "0.tar").read_bytes()


def test_another_setting_is_refused(classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(classes, out, "--split", "val", "--label", "label") == 0
    os.remove(classes / "val" / "n01484850" / "0.png")
    os.remove(classes / "val" / "n01484850" / "1.png")
    os.rmdir(classes / "val" / "n01484850")
    assert prepare(classes, out, "--split", "val", "--label", "label") == 1  # other classes
    assert "was prepared with other settings" in capsys.readouterr().err


def test_presets_read_it():
    assert imagenet("wds:x").split is None
    assert imagenet().split == "validation"
    assert coco("wds:x").captions == ("caption",)
    assert coco("data/dataset_coco.json").split == "test"
    assert coco().captions == ("captions/text",)
