"""`vlm train --init-from MODEL --data.source FOLDER`: what the folder decides, and what it asks."""

import csv
import json
import re
import shlex

import numpy as np
import pytest
import tiny
from PIL import Image

from vlm.cli import main
from vlm.cli.train import _names_of, experiment_of
from vlm.config import DataConfig
from vlm.data.hold_out import part_of
from vlm.data.image_folder import metadata_table
from vlm.data.sources import classes_of, open_source, open_to_measure, split_names
from vlm.errors import ConfigError, DataError
from vlm.training.data_defaults import DataDefaults, batch_size_for


def draw(path, colour, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.clip(np.array(tiny.COLOURS[colour]) + shade, 0, 255).astype(np.uint8)
    Image.fromarray(np.broadcast_to(rgb, (20, 20, 3)).copy()).save(path)


def folders(root, counts, names="{}"):
    """Class folders: so many images of each colour."""
    for colour, count in counts.items():
        for i in range(count):
            ending = ("png", "PNG", "jpg", "JPeG")[i % 4]
            draw(root / names.format(colour) / f"{i:02d}.{ending}", colour, 3 * i)
    return root


def decided(root, *options):
    args = ["--init-from", str(tiny.run()), "--data.source", str(root), *map(str, options)]
    return DataDefaults(experiment_of(args), _names_of(args))


@pytest.mark.parametrize(
    ("count", "ways", "batch"),
    [(60, 1, 15), (60, 8, 8), (5, 1, 5), (20, 1, 8), (3, 8, 8), (400, 1, 100), (10**6, 1, 128),
     (10**6, 48, 96), (1, 1, 1)],
)  # fmt: skip
def test_the_batch_follows_the_data(count, ways, batch):
    assert batch_size_for(count, ways) == batch
    assert batch % ways == 0


def test_class_folders_need_no_option(tmp_path):
    root = folders(tmp_path / "pets", {"red": 20, "green": 20, "blue": 20}, "a_{}_square")
    made = decided(root)
    e = made.experiment
    assert (e.data.label, e.objective) == ("label", "flyp")
    assert (e.data.eval_split, e.data.hold_out) == ("validation", 0.2)
    assert (e.batch_size, e.epochs) == (8, 17.0)  # eight devices in the tests
    assert e.data.templates == ("{}",)  # of the model
    text = "\n".join(made.lines())
    for part in (
        "--data.label label\n", "3 folders: a_blue_square, a_green_square, a_red_square",
        "--objective flyp\n", "such as 'a blue square'", "3 of 3 labels reworded",
        "--data.eval-split validation --data.hold-out 0.2\n", "20% of each class, 12 of 60 images",
        "--batch-size 8\n", "of 48 training images", "--epochs 17\n", "102 steps",
    ):  # fmt: skip
        assert part in text, part

    # The options that are named give the same experiment, and leave nothing to choose.
    options = [line.strip() for line in made.lines() if line.startswith("  --")]
    again = decided(root, *(word for option in options for word in shlex.split(option)))
    assert again.experiment == e
    assert again.lines() == []


def test_what_is_given_is_kept(tmp_path):
    root = folders(tmp_path / "pets", {"red": 8, "green": 8})
    e = decided(
        root, "--objective", "classification", "--batch-size=16", "--steps", 3, "--data.templates",
        "a {} thing", "--data.eval_split", "None",
    ).experiment  # fmt: skip
    assert (e.objective, e.batch_size, e.steps, e.epochs) == ("classification", 16, 3, None)
    assert e.data.templates == ("a {} thing",)
    assert (e.data.eval_split, e.data.hold_out) == (None, 0.0)
    assert e.data.label == "label"


def test_the_held_out_split_is_the_same_stratified_and_apart(tmp_path):
    root = folders(tmp_path / "pets", {"red": 10, "green": 5, "blue": 1})
    data = decided(root).experiment.data
    train, held = (open_source(data, split) for split in ("train", "validation"))
    paths = [[source[i]["image"] for i in range(len(source))] for source in (train, held)]
    assert not set(paths[0]) & set(paths[1])
    assert len(set(paths[0]) | set(paths[1])) == 16
    labels = [held[i]["label"] for i in range(len(held))]
    assert labels == ["green", "red", "red"]  # a fifth of each, and not the only blue one
    again = open_source(data, "validation")
    assert [again[i]["image"] for i in range(len(again))] == paths[1]
    assert split_names(data) == ["train", "validation"]
    assert classes_of(data, held).labels == ["blue", "green", "red"]
    measured, name = open_to_measure(data, "validation")
    assert (name, len(measured)) == ("validation", 3)
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(data, "test")


def test_nothing_to_hold_out_is_one_sentence(tmp_path):
    root = folders(tmp_path / "pets", {"red": 1, "green": 1})
    with pytest.raises(DataError, match=r"no class of two examples.*data.hold_out=0"):
        decided(root)
    data = DataConfig(source=str(root), label="label", captions=(), eval_split="x", hold_out=0.5)
    whole = open_source(DataConfig(str(root), label="label", captions=(), eval_split=None), "train")
    with pytest.raises(DataError, match="holds out nothing"):
        part_of(whole, data, held=True)


def test_a_split_of_the_source_is_not_held_out_again(tmp_path):
    root = tmp_path / "pets"
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        folders(root / split, {"red": count, "green": count})
    e = decided(root).experiment
    assert (e.data.eval_split, e.data.hold_out) == ("val", 0.0)
    assert len(open_source(e.data, "val")) == 4
    data = DataConfig(str(root), label="label", captions=(), eval_split="test", hold_out=0.2)
    with pytest.raises(DataError, match="has a split 'test' of its own"):
        open_source(data, "train")
    with pytest.raises(ConfigError, match="random access"):
        DataConfig("a/*.tar", hold_out=0.2, access="stream")
    with pytest.raises(ConfigError, match="set eval_split"):
        DataConfig("a.csv", hold_out=0.2, eval_split=None)
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        DataConfig("a.csv", hold_out=1.0)


@pytest.mark.parametrize(
    ("splits", "eval_split", "hold_out", "trained"),
    [
        (("train", "test"), "test", 0.0, 12),
        (("training", "testing"), "test", 0.0, 12),
        (("Train", "valid"), "validation", 0.0, 12),
        (("train",), "validation", 0.2, 10),
    ],
)
def test_split_folders(tmp_path, splits, eval_split, hold_out, trained):
    for split in splits:
        folders(tmp_path / "pets" / split, {"red": 6, "green": 6})
    data = decided(tmp_path / "pets").experiment.data
    found = data.eval_split
    assert (found, data.hold_out) in ((eval_split, hold_out), (splits[-1], hold_out))
    assert len(open_source(data, "train")) == trained
    assert len(open_source(data, found)) == (12 if len(splits) == 2 else 2)


def test_imagenets_folders_get_its_names(tmp_path):
    root = tmp_path / "imagenet"
    for label, colour in (("n01440764", "red"), ("n01443537", "green")):
        for i in range(5):
            draw(root / label / f"{label}_{i}.JPEG", colour, i)
    made = decided(root)
    assert any("'tench'" in line for line in made.lines())
    assert classes_of(made.experiment.data).labels == ["n01440764", "n01443537"]


def test_numbers_need_names(tmp_path):
    root = folders(tmp_path / "digits", {"red": 4, "green": 4})
    (root / "red").rename(root / "0")
    (root / "green").rename(root / "1")
    with pytest.raises(DataError, match=r"class '0' .* is a number.*--data.class-names FILE"):
        decided(root)
    (tmp_path / "names.txt").write_text("zero\none\n")
    made = decided(root, "--data.class-names", tmp_path / "names.txt")
    assert any("such as 'zero'" in line for line in made.lines())


def test_the_inner_folder_of_nested_ones_is_the_class(tmp_path):
    root = tmp_path / "animals"
    for group, colour in (("mammals", "red"), ("birds", "green")):
        for name in ("small", "large"):
            for i in range(4):
                draw(root / group / f"{name} {group}" / f"{i}.png", colour, i)
    labels = classes_of(decided(root).experiment.data).labels
    assert labels == ["large birds", "large mammals", "small birds", "small mammals"]
    draw(root / "mammals" / "cat.png", "blue")
    with pytest.raises(DataError, match="lie at different depths"):
        decided(root)


def test_files_that_unpacking_leaves_are_no_classes(tmp_path):
    root = folders(tmp_path / "pets", {"red": 4, "green": 4})
    draw(root / "__MACOSX" / "red" / "._0.png", "red")
    (root / ".git").mkdir()
    (root / "blue").mkdir()  # no image yet
    (root / "red" / "Thumbs.db").write_bytes(b"x")
    assert classes_of(decided(root).experiment.data).labels == ["green", "red"]


def metadata(folder, rows, ending="csv"):
    if ending == "csv":
        with open(folder / "metadata.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_an_imagefolder_of_hugging_face_is_read_by_its_table(tmp_path, ending):
    root = tmp_path / "hf"
    for i in range(10):
        draw(root / f"{i}.png", "red" if i % 2 else "green", i)
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(10)]
    metadata(root, rows, ending)
    e = decided(root).experiment
    assert e.data.source == str(root / f"metadata.{ending}")
    assert (e.data.image, e.data.captions, e.data.label) == ("file_name", ("text",), None)
    assert (e.objective, e.data.eval_split, e.batch_size) == ("contrastive", None, 8)
    labelled = [{"file_name": r["file_name"], "label": ("a", "b")[i % 2]}
                for i, r in enumerate(rows)]  # fmt: skip
    metadata(root, labelled, ending)
    e = decided(root).experiment
    assert (e.data.label, e.objective) == ("label", "flyp")
    assert len(open_source(e.data, "validation")) == 2
    both = [a | {"text": "x"} for a in labelled]
    metadata(root, both, ending)
    with pytest.raises(DataError, match=r"add --data.label label .* or --data.captions text"):
        decided(root)
    assert decided(root, "--data.label", "label").experiment.data.label == "label"
    metadata(root, [{"file_name": "0.png", "colour": "red"}], ending)
    with pytest.raises(DataError, match=r"columns file_name, colour: add --data.label COLUMN"):
        decided(root)


def test_tables_in_split_folders(tmp_path):
    root = tmp_path / "hf"
    for split, count in (("train", 8), ("test", 4)):
        for i in range(count):
            draw(root / split / f"{i}.png", "red" if i % 2 else "green", i)
        rows = [{"file_name": f"{i}.png", "label": ("a", "b")[i % 2]} for i in range(count)]
        metadata(root / split, rows)
    e = decided(root).experiment
    assert e.data.source == f"{root}/{{split}}/metadata.csv"
    assert (e.data.eval_split, len(open_source(e.data, "test"))) == ("test", 4)
    metadata(root, [{"file_name": "train/0.png", "label": "a"}])
    with pytest.raises(DataError, match="one table for the folders test, train"):
        decided(root)


def test_what_is_ambiguous_asks(tmp_path):
    root = folders(tmp_path / "pets", {"red": 4, "green": 4})
    (root / "red" / "00.txt").write_text("a red thing")
    question = (
        r"texts beside its images, and 2 class folders .*--data.captions caption.*--data.label"
    )
    with pytest.raises(DataError, match=question):
        decided(root)
    assert decided(root, "--data.label", "label").experiment.objective == "flyp"
    made = decided(root, "--data.captions", "caption").experiment
    assert (made.objective, made.data.label) == ("contrastive", None)
    with pytest.raises(DataError, match=r"one folder 'red'.*name the folder that holds"):
        decided(folders(tmp_path / "one", {"red": 4}))


def test_pairs_are_what_they_were(tmp_path):
    root = folders(tmp_path / "pets", {"red": 4, "green": 4})
    for path in root.rglob("*.*"):
        path.with_suffix(".txt").write_text(f"a {path.parent.name} thing")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in root.rglob("*.*"):
        path.rename(flat / f"{path.parent.name}-{path.name}")
    made = decided(flat)
    assert (made.experiment.objective, made.experiment.data.label) == ("contrastive", None)
    assert made.experiment.data.eval_split is None
    assert [option for option, _ in made.choices] == ["--batch-size 8", "--epochs 100"]
    with pytest.raises(DataError, match="is unknown"):
        decided(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_command_trains_and_its_run_classifies(tmp_path, capfd):
    root = folders(tmp_path / "pets", {"red": 12, "green": 12, "blue": 12}, "a_{}_square")
    line = ["train", "--init-from", str(tiny.run()), "--data.source", str(root)]
    assert main([*line, "--run-dir", str(tmp_path / "run"), "--epochs", "4"]) == 0
    message = capfd.readouterr().err
    assert "--batch-size 8" in message
    assert re.search(r"held-out top-1 .* of 6", message)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["objective"], config["data"]["hold_out"]) == ("flyp", 0.2)
    # The run classifies without labels: among the classes of its folders.
    image = next(root.rglob("*.png"))
    assert main(["classify", "--model", str(tmp_path / "run"), str(image), "--json"]) == 0
    row = json.loads(capfd.readouterr().out.splitlines()[0])
    assert {label["label"] for label in row["labels"]} == {f"a_{c}_square" for c in tiny.COLOURS}


def test_a_named_training_split_is_the_one_that_is_inspected(tmp_path):
    folders(tmp_path / "pets" / "all2024", {"red": 20, "blue": 20})
    folders(tmp_path / "pets" / "val", {"red": 4, "blue": 4})
    made = decided(tmp_path / "pets", "--data.train-split", "all2024")
    assert made.experiment.data.train_split == "all2024"
    assert made.experiment.data.eval_split == "val"


def test_a_bad_first_row_of_a_metadata_table_is_a_bad_sample(tmp_path):
    root = folders(tmp_path, {"red": 30})
    rows = ["file_name,text", ",nothing", *(f"{p.relative_to(root)},a red square" for p in sorted(
        p for p in root.rglob("*") if p.is_file()
    ))]  # fmt: skip
    (root / "metadata.csv").write_text("\n".join(rows))
    assert metadata_table(str(root)) == f"{root}/metadata.csv"
