"""COCO's JSON as torchvision and pycocotools read it, and as vlm does: equal image by image."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")
datasets = pytest.importorskip("torchvision.datasets")

from vlm.config import DataConfig  # noqa: E402
from vlm.data.sources import open_source  # noqa: E402
from vlm.data.storage import read_file  # noqa: E402

pytestmark = pytest.mark.peers

CLASSES = [{"id": 3, "name": "cat"}, {"id": 90, "name": "traffic light"}]


@pytest.fixture
def folder(tmp_path) -> Path:
    """COCO's folders with images in an order of their own, and annotations in another."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    dice = np.random.default_rng(0)
    ids = dice.permutation(1000)[:12].tolist()
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "coco_url": "http://x/y.jpg"} for i in ids]
    for one in images:
        pixels = dice.integers(0, 256, (9, 11, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train2017" / one["file_name"])
    captions = [
        {"id": n, "image_id": i, "caption": f"caption {n} of {i}"}
        for n, i in enumerate(dice.permutation(ids * 5).tolist())
    ]
    instances = [
        {
            "id": n, "image_id": i, "category_id": [3, 90][int(dice.integers(2))],
            "bbox": [0, 0, 3, 3], "area": 9, "iscrowd": 0,
        }
        for n, i in enumerate(dice.permutation(ids * 2).tolist())
    ]  # fmt: skip
    for name, annotations in (("captions", captions), ("instances", instances)):
        data = {"images": images, "annotations": annotations, "categories": CLASSES}
        if name == "captions":
            del data["categories"]
        (tmp_path / "annotations" / f"{name}_train2017.json").write_text(json.dumps(data))
    return tmp_path


def test_captions(folder):
    path = folder / "annotations" / "captions_train2017.json"
    theirs = datasets.CocoCaptions(str(folder / "train2017"), str(path))
    ours = open_source(DataConfig(str(path)), "train")
    assert len(ours) == len(theirs) == 12
    found = {Path(ours[i]["image"]).name: ours[i] for i in range(12)}
    for number, (image, captions) in zip(theirs.ids, theirs, strict=True):
        example = found[f"{number:012d}.jpg"]
        assert example["caption"] == list(captions)
        with Image.open(example["image"]) as opened:
            np.testing.assert_array_equal(np.asarray(opened.convert("RGB")), np.asarray(image))


def test_instances(folder):
    from pycocotools.coco import COCO

    path = folder / "annotations" / "instances_train2017.json"
    theirs = COCO(str(path))
    ours = open_source(DataConfig(str(path), captions=("category",)), "train")
    for example in (ours[i] for i in range(12)):
        shown = theirs.loadAnns(theirs.getAnnIds(example["id"]))
        assert set(example["category"]) == {
            theirs.loadCats(annotation["category_id"])[0]["name"] for annotation in shown
        }
        assert read_file(example["image"])
