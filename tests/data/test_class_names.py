"""Labels made readable: as data sets write them, and their names in prompts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm.config import DataConfig
from vlm.data.class_names import class_name, described, names_of, read_class_names, readable
from vlm.data.examples import captions_of
from vlm.data.sources import classes_of, open_source
from vlm.errors import DataError

# Labels as published data sets write them, and their names.
LABELS = {
    "golden_retriever": "golden retriever",
    "001.Black_footed_Albatross": "Black footed Albatross",  # CUB-200
    "118.House_Sparrow": "House Sparrow",
    "002.american-flag": "american flag",  # Caltech-256
    "145.motorbikes-101": "motorbikes-101",
    "n02085620-Chihuahua": "Chihuahua",  # Stanford Dogs
    "n02099267-flat-coated_retriever": "flat-coated retriever",
    "AnnualCrop": "Annual Crop",  # EuroSAT
    "SeaLake": "Sea Lake",
    "Forest": "Forest",
    "/a/apartment_building/outdoor": "apartment building outdoor",  # SUN397
    "aquarium_fish": "aquarium fish",  # CIFAR-100
    "AM General Hummer SUV 2000": "AM General Hummer SUV 2000",  # Stanford Cars
    "747-400": "747-400",  # FGVC Aircraft
    "F/A-18": "F/A-18",
    "DC-10": "DC-10",
    "ATR-42": "ATR-42",
    "t-shirt": "t-shirt",
    "x-ray": "x-ray",
    "McDonald": "McDonald",
    "DeLorean": "DeLorean",
    "BMW": "BMW",
    "n01440764": "n01440764",  # a number of WordNet alone is no name
    "12": "12",
    "-1": "-1",
    "3d_printer": "3d printer",
    "  two   spaces ": "two spaces",
    "Käse_brot": "Käse brot",
    "___": "___",
    "": "",
}


@pytest.mark.parametrize(("label", "name"), LABELS.items())
def test_labels_of_published_data_sets(label, name):
    assert readable(label) == name


@given(st.text(max_size=24))
def test_a_readable_name_is_never_blank_and_keeps_its_letters(label):
    name = readable(label)
    assert bool(name.strip()) == bool(label.strip()) or not label.strip()
    if not any(c.isdigit() or c == "/" for c in label):
        assert [c for c in name if c.isalpha()] == [c for c in label if c.isalpha()]


def test_two_classes_never_get_one_name():
    with pytest.raises(DataError, match="'a_b', 'a b' of pets would all be called 'a b'"):
        names_of(["a_b", "a b", "c"], where="pets")
    with pytest.raises(DataError, match="would all be called 'Crane'"):
        names_of(["134.Crane", "135.Crane"])
    assert names_of(["134.Crane", "135.Crane"], {"135.Crane": "construction crane"}) == [
        "Crane",
        "construction crane",
    ]


def test_what_is_reworded_is_told():
    labels = ["golden_retriever", "cat"]
    assert described(labels, names_of(labels)) == (
        "1 of 2 labels reworded, such as 'golden_retriever' to 'golden retriever'"
    )
    assert described(["cat"], ["cat"]) == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.txt", "Zero \r\nOne\n\nTwo\n"),
        ("pairs.tsv", "\ufeffb_1\tOne\na_0\tZero\nc_2\tTwo\n"),
        ("names.json", json.dumps({"a_0": "Zero", "b_1": "One", "c_2": "Two", "more": "x"})),
        ("list.json", json.dumps(["Zero", "One", "Two"])),
    ],
)
def test_a_file_of_names(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text.encode())
    found = read_class_names(str(file), ["a_0", "b_1", "c_2"], "pets")
    assert found == {"a_0": "Zero", "b_1": "One", "c_2": "Two"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "Zero\nOne\n", "has 2 lines for the 3 labels of pets, and none names 'a_0'"),
        ("b.txt", "a_0\tZero\nb_1\tOne\n", "none names 'c_2'"),
        ("c.txt", "a_0\tZero\nOne\nTwo\n", "with and without a tab"),
        ("d.json", "{", "is not JSON"),
        ("e.json", '{"a_0": 1}', "holds no names"),
        ("f.txt", None, "there is no file of class names"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_names(str(tmp_path / name), ["a_0", "b_1", "c_2"], "pets")


@pytest.fixture
def pets(tmp_path):
    for split in ("train", "val"):
        for name in ("golden_retriever", "AnnualCrop", "cat"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "pets" / split / name / "1.png")
    return str(tmp_path / "pets")


def test_captions_have_names_and_examples_their_labels(pets, tmp_path):
    config = DataConfig(pets, label="label", templates=("a {}.",), eval_split="val")
    classes = classes_of(config)
    assert classes.labels == ["AnnualCrop", "cat", "golden_retriever"]
    assert classes.names == ["Annual Crop", "cat", "golden retriever"]
    source = open_source(config, "val")
    assert [source[i]["label"] for i in range(3)] == classes.labels
    assert captions_of(source[2], config) == ["a golden retriever."]
    for text in ("field\ntom cat\ndog", "cat\ttom cat\nAnnualCrop\tfield\ngolden_retriever\tdog"):
        file = tmp_path / "names.txt"
        file.write_text(text)
        named = DataConfig(
            pets, label="label", templates=("a {}.",), class_names=str(file), eval_split="val"
        )
        assert classes_of(named) == (classes.labels, ["field", "tom cat", "dog"])
        source = open_source(named, "val")
        assert [source[i]["label"] for i in range(3)] == classes.labels
        assert [captions_of(source[i], named) for i in range(3)] == [
            ["a field."], ["a tom cat."], ["a dog."]
        ]  # fmt: skip


def test_labels_of_a_stream_are_named_one_by_one(tmp_path):
    (tmp_path / "names.json").write_text('{"x_1": "an x"}')
    config = DataConfig("x.tar", label="cls", class_names=str(tmp_path / "names.json"))
    assert class_name("x_1", config) == "an x"
    assert class_name("x_1", DataConfig("x.tar", label="cls")) == "x 1"
    with pytest.raises(DataError, match="does not name the label 'y'"):
        class_name("y", config)
    (tmp_path / "list.txt").write_text("an x\n")
    with pytest.raises(DataError, match="in the order of the labels"):
        class_name("x_1", DataConfig("x.tar", label="c", class_names=str(tmp_path / "list.txt")))


def test_numbers_are_sorted_by_their_value(tmp_path):
    lines = ["image,label,split"]
    for i in (10, 2, 1, 9):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i},test")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    (tmp_path / "names.txt").write_text("one\ntwo\nnine\nten\n")
    config = DataConfig(str(tmp_path), label="label", class_names=str(tmp_path / "names.txt"))
    found = classes_of(config, open_source(config, "test"))
    assert found.labels == ["1", "2", "9", "10"]
    assert found.names == ["one", "two", "nine", "ten"]
