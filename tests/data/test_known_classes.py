"""Names of public data sets' classes, and labels that are no names."""

import io

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlm.config import DataConfig
from vlm.data.class_names import class_name, names_of
from vlm.data.examples import captions_of
from vlm.data.known_classes import classes_of_tfds, known_classes, tfds_names
from vlm.data.prepared import TfdsSource
from vlm.data.sources import classes_of, open_source
from vlm.errors import DataError
from vlm.evaluation.suites import open_task
from vlm.evaluation.tasks import ZeroShotTask

SUBSETS = {"imagenet-a": 200, "imagenet-r": 200, "imagenet-o": 200, "imagenetv2": 1000}


def test_imagenet_and_its_subsets():
    imagenet = known_classes("imagenet1k")
    assert len(imagenet.names) == len(imagenet.wordnet_ids) == 1000
    assert len(imagenet.templates) == 80
    assert all(template.count("{}") == 1 for template in imagenet.templates)
    name_of = dict(zip(imagenet.wordnet_ids, imagenet.names, strict=True))
    # Of torchvision's and open_clip's lists.
    assert [name_of[i] for i in ("n01440764", "n02123045", "n15075141")] == [
        "tench", "tabby cat", "toilet paper",
    ]  # fmt: skip
    for subset, count in SUBSETS.items():
        known = known_classes(subset)
        assert len(known.names) == count
        assert [name_of[i] for i in known.wordnet_ids] == list(known.names)
        assert known.templates == imagenet.templates
    assert known_classes("no such data") is None


def test_every_known_data_set_of_tfds_has_templates():
    for name in tfds_names().values():
        known = known_classes(name)
        assert known is not None, name
        assert known.templates, name
        assert all("{}" in template for template in known.templates), name
    assert classes_of_tfds("mnist", [str(i) for i in range(10)]).names[7] == "7"
    assert classes_of_tfds("mnist", ["zero", "one"]) is None  # another data set of this name
    assert classes_of_tfds("imagenet2012", ["cat", "dog"]) is None
    assert classes_of_tfds("cats_vs_dogs", ["cat", "dog"]) is None


def test_the_order_of_classes_is_that_of_tfds():
    """Data sets whose files TFDS carries list the same classes in the same order."""
    from tensorflow_datasets.core.utils import resource_utils

    folder = resource_utils.tfds_path()
    ids = (folder / "datasets/imagenet2012/labels.txt").read_text().split()
    assert known_classes("imagenet1k").wordnet_ids == tuple(ids)
    theirs = (folder / "image_classification/caltech101_labels.txt").read_text().splitlines()
    ours = known_classes("vtab/caltech101").names
    assert len(ours) == len(theirs) == 102
    same = [
        name.rstrip("s").replace("_", " ") == own.rstrip("s")
        for own, name in zip(ours, theirs, strict=True)
    ]
    assert sum(same) > 90


def class_folders(folder, names, per_class=2):
    for value, name in enumerate(names):
        (folder / "val" / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", (4, 4), (40 * value, i, 0)).save(folder / "val" / name / f"{i}.png")
    return DataConfig(source=str(folder), label="label", captions=(), eval_split="validation")


def test_folders_of_wordnet_ids_are_imagenets_classes(tmp_path):
    # Two classes are called "missile": the label distinguishes them.
    ids = ["n01443537", "n02123045", "n03773504", "n04008634"]
    config = class_folders(tmp_path, ids)
    source = open_source(config, "validation")
    labels, names = classes_of(config, source)
    assert labels == ids
    assert names == ["goldfish", "tabby cat", "missile", "missile"]
    assert source.templates == known_classes("imagenet1k").templates
    assert source[0]["label"] == "n01443537"
    assert captions_of(source[0], DataConfig(label="label", templates=("a {}",))) == ["a goldfish"]
    # One at a time, as a stream has them.
    assert class_name("n02123045", config) == "tabby cat"


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["n01443537", "n00007846"], r"class 'n00007846' of .* is a WordNet id"),
        (["0", "1", "2"], r"class '0' of .* is a number"),
        (["cat", "-1"], r"class '-1' of .* is a number"),
    ],
)
def test_labels_that_are_no_names_are_refused(tmp_path, names, fault):
    config = class_folders(tmp_path, names)
    with pytest.raises(DataError, match=f"{fault}.*--class-names FILE"):
        classes_of(config, open_source(config, "validation"))
    with pytest.raises(DataError, match=f"{fault}.*--class-names FILE"):
        names_of(names, where="photos")
    # Names in a file are unchanged: digits have numbers for names.
    lines = [f"{name}\t{number}" for number, name in enumerate(names)]
    (tmp_path / "names.txt").write_text("\n".join(lines))
    named = DataConfig(**{**vars(config), "class_names": str(tmp_path / "names.txt")})
    found = classes_of(named, open_source(named, "validation"))
    assert dict(zip(*found, strict=True)) == {name: str(i) for i, name in enumerate(names)}


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Four classes of ImageNet, and a test split without labels, as TFDS has it."""

    VERSION = tfds.core.Version("5.1.0")
    IDS = known_classes("imagenet1k").wordnet_ids

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(self.IDS)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        numbers = {"validation": [657, 744, 1], "test": [-1, -1]}
        return {split: self._generate_examples(labels) for split, labels in numbers.items()}

    def _generate_examples(self, labels):
        for i, label in enumerate(labels):
            image = io.BytesIO()
            Image.new("RGB", (4, 4), (i, 0, 0)).save(image, "PNG")
            image.seek(0)
            yield i, {"image": image, "label": label}


def test_a_prepared_imagenet_has_its_names_and_a_split_without_labels_is_refused(tmp_path):
    tfds.disable_progress_bar()
    builder = Imagenet2012(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    config = DataConfig(source="tfds:imagenet2012", label="label", data_dir=str(tmp_path))
    source = open_source(config, "validation")
    assert sorted(source[i]["label"] for i in range(3)) == ["n01443537", "n03773504", "n04008634"]
    found = classes_of(config, source)
    assert (len(found.labels), len(set(found.labels)), len(set(found.names))) == (1000, 1000, 998)
    assert len(source.templates) == 80
    unlabelled = TfdsSource(builder, "test", config)
    with pytest.raises(DataError, match="has the label -1, which is none: name a split that has"):
        unlabelled[0]
    task = open_task("tfds:imagenet2012", str(tmp_path))
    assert isinstance(task, ZeroShotTask)
    assert task.data.split == "validation"  # and not the test split
    assert (len(task.captions), len(task.templates)) == (1000, 80)
    assert [task.names[i] for i in sorted(task.target)] == ["goldfish", "missile", "missile"]
