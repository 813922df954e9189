"""Folders in CLIP_benchmark's layout, written by hand beside what its own reader does."""

import io
import pickle

import numpy as np
import pytest
from kinds import write_tar
from PIL import Image

from vlm.config import DataConfig
from vlm.data.clip_benchmark import PREFIX, _root, _shards, _texts, dataset_type
from vlm.data.examples import captions_of
from vlm.data.sources import classes_of, kind_of, open_source, open_to_measure, split_names
from vlm.errors import DataError


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def npy(values) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(values, np.int64))
    return out.getvalue()


def write(root, extension, targets, shards=2, split="test", **texts):
    """Shards as `clip_benchmark_export_wds` writes them, and the texts beside them."""
    (root / split).mkdir(parents=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    (root / split / "nshards.txt").write_text(f"{shards}\n")
    for shard, rows in enumerate(np.array_split(np.arange(len(targets)), shards)):
        members = []
        for row in rows.tolist():
            members += [(f"s{row:07d}.webp", png(row)), (f"s{row:07d}.{extension}", targets[row])]
        write_tar(root / split / f"{shard}.tar", members)
    return str(root)


NAMES = "great white shark\nmissile\n\nmissile\n7\n"
TEMPLATES = "a photo of a {c}.\nart of the {c}.\n"


@pytest.fixture
def classified(tmp_path):
    return write(
        tmp_path / "wds",
        "cls",
        [b"3", b"0", b"2", b"1", b"4"],
        classnames=NAMES,
        zeroshot_classification_templates=TEMPLATES,
    )


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_labels_names_and_templates_are_read_as_they_are_written(classified, prefix):
    config = DataConfig(source=prefix + classified, label="label", captions=())
    assert kind_of(config.source) == "clip_benchmark"
    assert split_names(config) == ["test"]
    source, split = open_to_measure(config, None)
    assert split == "test"
    labels, names = classes_of(config, source)
    # Names are unchanged: spaces, numbers and blanks as in the file.
    assert names == ["great white shark", "missile", "", "missile", "7"]
    assert len(set(labels)) == 5
    found = [names[labels.index(source[i]["label"])] for i in range(len(source))]
    assert found == ["missile", "great white shark", "", "missile", "7"]
    assert [labels.index(source[i]["label"]) for i in range(5)] == [3, 0, 2, 1, 4]
    assert source.templates == ("a photo of a {}.", "art of the {}.")
    assert [source[i]["image"] for i in range(5)] == [png(i) for i in range(5)]
    one = DataConfig(label="label", templates=("a {}",))
    assert [captions_of(source[i], one) for i in (1, 2)] == [["a great white shark"], ["a "]]
    assert pickle.loads(pickle.dumps(source))[3]["label"] == source[3]["label"]


def test_each_line_of_a_text_is_a_caption_of_its_own(tmp_path):
    texts = [b"a dog runs\na dog, running", b"two cats"]
    root = write(tmp_path / "wds", "txt", texts, dataset_type="retrieval\n")
    assert dataset_type(root) == "retrieval"
    config = DataConfig(source=root)
    source = open_source(config, "test")
    found = [captions_of(source[i], config) for i in range(2)]
    assert found == [["a dog runs", "a dog, running"], ["two cats"]]
    with pytest.raises(DataError, match=r"has no feature 'label' .* it has caption, image, txt"):
        open_source(DataConfig(source=root, label="label"), "test")


def test_multilabel_data_has_the_labels_that_are_shown(tmp_path):
    rows = [npy([1, 0, 1]), npy([0, 1, 0])]
    root = write(
        tmp_path / "wds", "npy", rows, 1, dataset_type="multilabel", classnames="a\nb\nc\n"
    )
    source = open_source(DataConfig(source=root, label="npy"), "test")._source
    assert [source[i]["npy"] for i in range(2)] == [["a", "c"], ["b"]]


@pytest.mark.parametrize("label", [b"5", b"-1"])
def test_a_number_of_no_class_is_refused(tmp_path, label):
    root = write(tmp_path / "wds", "cls", [b"0", label], 1, classnames=NAMES)
    source = open_source(DataConfig(source=root, label="cls"), "test")
    with pytest.raises(DataError, match=f"label {int(label)} of .* is not one of the 5 classes"):
        source[1]


def test_what_a_folder_lacks_is_named(tmp_path, classified):
    config = DataConfig(source=classified, label="label")
    with pytest.raises(DataError, match="has no split 'train': it has test"):
        open_source(config, "train")
    with pytest.raises(DataError, match=r"no test/nshards\.txt"):
        open_to_measure(DataConfig(source=f"{PREFIX}{tmp_path}/gone", label="label"), None)
    unnamed = write(tmp_path / "unnamed", "cls", [b"0", b"1"], 1)
    config = DataConfig(source=unnamed, label="label", eval_split="test")
    with pytest.raises(DataError, match=r"class '0' of .* is a number.*--class-names FILE"):
        classes_of(config, open_source(config, "test"))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    named = DataConfig(source=unnamed, label="label", class_names=str(tmp_path / "names.txt"))
    assert classes_of(named, open_source(named, "test")).names == ["cat", "dog"]


def test_a_part_of_the_shards_is_not_the_data(tmp_path):
    root = tmp_path / "wds"
    write(root, "cls", [b"0", b"1", b"2", b"3"], classnames=NAMES)
    (root / "test" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar"):
        open_source(DataConfig(source=str(root), label="label"), "test")


def test_a_folder_in_a_bucket(classified):
    import fsspec

    bucket = fsspec.filesystem("memory")
    bucket.put(classified, "/wds_pets", recursive=True)
    config = DataConfig(source="wds:memory://wds_pets/", label="label")
    local = open_source(DataConfig(source=classified, label="label"), "test")
    source, split = open_to_measure(config, None)
    assert split == "test"
    assert classes_of(config, source) == classes_of(config, local)
    for i in range(len(local)):
        assert [source[i][name] for name in ("image", "label")] == [
            local[i][name] for name in ("image", "label")
        ]


def test_the_hubs_web_pages_have_two_addresses():
    page = "https://huggingface.co/datasets/clip-benchmark/wds_cifar10/tree/main"
    base = "https://huggingface.co/datasets/clip-benchmark/wds_cifar10"
    assert _texts(_root(f"wds:{page}/")) == f"{base}/raw/main"
    assert _shards(_root(f"wds:{page}")) == f"{base}/resolve/main"
