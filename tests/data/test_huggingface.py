"""Files that Hugging Face `datasets` wrote, read without it: golden/huggingface.py made them."""

import dataclasses
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from kinds import PREPROCESS, TOKENIZER, jpeg

from vlm.config import DataConfig
from vlm.data.columns import Columns
from vlm.data.examples import captions_of
from vlm.data.faults import BadSample
from vlm.data.pipeline import train_batches
from vlm.data.sources import classes_of, open_source
from vlm.errors import DataError

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(GOLDEN))

from huggingface import CLASSES, COUNT, plain_example  # noqa: E402 (a script, in its own folder)

ROWS = json.loads((GOLDEN / "rows.json").read_text())
FIELDS = (
    "labels", "caption", "captions", "long", "sentences/raw", "info/text/en", "info/text/de",
    "info/score", "translation/en", "translation/fr", "label",
)  # fmt: skip
SOURCES = {
    "parquet": "data/{split}-*.parquet",
    "saved": "saved",
    "arrow": "saved/{split}/data-*.arrow",
}


def config(kind, **options):
    if "label" not in options:
        options["captions"] = tuple(name for name in FIELDS if name != "info/score")
    return DataConfig(str(GOLDEN / SOURCES[kind]), access="random", **options)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_row_is_what_datasets_reads(kind, split):
    source = open_source(config(kind), split)
    assert len(source) == COUNT
    for index, expected in enumerate(ROWS[split]):
        example = dict(source[index])
        example.setdefault("info/score", expected["info/score"])  # Parquet: only what is named
        assert plain_example(example) == expected


@pytest.mark.parametrize("kind", SOURCES)
def test_classes_have_their_names(kind):
    labelled = config(kind, label="label", templates=("a photo of a {}.",))
    assert classes_of(labelled).labels == CLASSES
    source = open_source(labelled, "train")
    assert source.label_names == CLASSES
    assert [captions_of(source[i], labelled) for i in (0, 1)] == [
        ["a photo of a tabby cat."],
        ["a photo of a dog."],
    ]
    with pytest.raises(BadSample, match="has no label in label"):
        captions_of(source[2], labelled)
    several = config(kind, label="labels")
    with pytest.raises(BadSample, match="2 labels in labels: name a feature with one"):
        captions_of(open_source(several, "train")[0], several)


def test_a_stream_has_the_names_too():
    streamed = dataclasses.replace(
        config("parquet", label="label", templates=("picture {}",)),
        access="stream", eval_split=None, interleave=1, max_bad_share=1.0, prefetch=0,
    )  # fmt: skip
    assert classes_of(streamed).labels == CLASSES
    iterator = train_batches(streamed, PREPROCESS, TOKENIZER, batch_size=2, seed=0)
    texts = {text.strip() for _ in range(6) for text in TOKENIZER.decode(next(iterator)["tokens"])}
    iterator.close()
    assert texts == {"picture tabby cat", "picture dog"}


def table(folder, rows, schema=None, name="a.parquet"):
    made = pyarrow.Table.from_pylist(rows, schema)
    pyarrow.parquet.write_table(made, folder / name)
    with pyarrow.ipc.new_file(str(folder / name.replace("parquet", "arrow")), made.schema) as out:
        out.write_table(made)
    return str(folder / name)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_in_every_form(tmp_path, suffix):
    """A path is relative to its table; bytes are taken before a path; an empty path is none."""
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    beside = str(tmp_path / "0.jpg")
    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    large = pyarrow.struct({"bytes": pyarrow.large_binary(), "path": pyarrow.large_string()})
    pointed = pyarrow.dictionary(pyarrow.int8(), pyarrow.string())
    forms = [
        (struct, {"bytes": jpeg(0), "path": "0.png"}, jpeg(0)),
        (struct, {"bytes": b"", "path": "0.jpg"}, b""),  # broken, and not another image
        (struct, {"bytes": None, "path": "0.jpg"}, beside),
        (struct, {"bytes": None, "path": ""}, None),
        (struct, {"bytes": None, "path": None}, None),
        (struct, None, None),
        (large, {"bytes": None, "path": "0.jpg"}, beside),
        (pyarrow.binary(), jpeg(0), jpeg(0)),
        (pyarrow.large_binary(), None, None),
        (pyarrow.string(), "0.jpg", beside),
        (pyarrow.large_string(), beside, beside),
        (pointed, "0.jpg", beside),
        (pyarrow.string_view(), "0.jpg", beside),
    ]
    for kind, value, expected in forms:
        if suffix == "parquet" and kind == pyarrow.string_view():
            continue  # Arrow alone has it
        schema = pyarrow.schema({"image": kind, "caption": pyarrow.string()})
        made = (
            pyarrow.Table.from_pylist([{"image": value, "caption": "a"}], schema)
            if (not pyarrow.types.is_dictionary(kind))
            else pyarrow.table(
                {"image": pyarrow.array([value]).dictionary_encode(), "caption": ["a"]}
            )
        )
        path = str(tmp_path / f"a.{suffix}")
        if suffix == "parquet":
            pyarrow.parquet.write_table(made, path)
        else:
            with pyarrow.ipc.new_file(path, made.schema) as out:
                out.write_table(made)
        data = DataConfig(path)
        assert open_source(data, "train")[0]["image"] == expected, kind
        assert Columns(made.schema, data, path).image_is_path == (
            kind in (pyarrow.string(), pyarrow.large_string(), pointed, pyarrow.string_view())
        )


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_features_that_hold_no_text_or_no_image_are_refused(tmp_path, suffix):
    rows = [
        {"image": {"bytes": b"x", "path": None}, "caption": 7, "vector": [1.0], "c": {"d": "e"}}
    ]
    path = table(tmp_path, rows).replace("parquet", suffix)
    for options, message in (
        ({}, "'caption' of .* that data.captions names has no text but int64"),
        ({"image": "vector", "captions": ("c/d",)}, "'vector' of .* has no image but list<"),
        ({"captions": ("c",)}, "no feature 'c' that data.captions names: it has c/d, caption"),
        ({"captions": ("c/e",)}, "no feature 'c/e'"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(DataConfig(path, access="random", **options), "train")
    assert open_source(DataConfig(path, captions=("c/d",)), "train")[0]["c/d"] == "e"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_captions_of_few_values_and_files_that_lack_them(tmp_path, suffix):
    """Dictionary-encoded, as pandas writes a categorical column; every file must have it."""
    texts = pyarrow.array(["a", "b", None, "a"]).dictionary_encode()
    made = pyarrow.table({"image": ["0.jpg"] * 4, "caption": texts})
    for name, rows in (("a", made), ("b", made.drop_columns(["caption"]))):
        pyarrow.parquet.write_table(rows, tmp_path / f"{name}.parquet")
        with pyarrow.ipc.new_file(str(tmp_path / f"{name}.arrow"), rows.schema) as out:
            out.write_table(rows)
    source = open_source(DataConfig(str(tmp_path / f"a.{suffix}")), "train")
    assert [source[i]["caption"] for i in range(4)] == ["a", "b", None, "a"]
    with pytest.raises(DataError, match=rf"b\.{suffix} has no feature 'caption'"):
        open_source(DataConfig(str(tmp_path / f"*.{suffix}")), "train")


def test_times_of_nanoseconds_break_no_row(tmp_path):
    """Python's times do not have them, and this column is none that is asked for."""
    kinds = {
        "image": pyarrow.string(),
        "caption": pyarrow.string(),
        "when": pyarrow.timestamp("ns"),
    }
    table(tmp_path, [{"image": "a", "caption": "b", "when": 7}], pyarrow.schema(kinds))
    for suffix in ("parquet", "arrow"):
        example = open_source(DataConfig(str(tmp_path / f"a.{suffix}")), "train")[0]
        assert example["caption"] == "b"
    assert example["when"].endswith("00:00:00.000000007")


def labelled_schema(names):
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    kinds = {"image": pyarrow.binary(), "label": pyarrow.int64()}
    return pyarrow.schema(kinds, metadata={"huggingface": about})


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_class_names_in_the_spellings_of_older_versions(tmp_path, suffix):
    """Lists as [feature] or Sequence; a Sequence of a dict is stored as a struct of lists."""
    pet = {"num_classes": 2, "names": ["cat", "dog"], "id": None, "_type": "ClassLabel"}
    features = {
        "list": [pet],
        "sequence": {"feature": pet, "length": -1, "_type": "Sequence"},
        "objects": {"feature": {"pet": pet, "box": [{"_type": "Value"}]}, "_type": "Sequence"},
        "inner": {"pet": pet, "_type": {"dtype": "string", "_type": "Value"}},
    }
    row = {
        "image": jpeg(0), "list": [1, 0], "sequence": [0], "objects": {"pet": [1, 1], "box": [[2]]},
        "inner": {"pet": 1, "_type": "a"},
    }  # fmt: skip
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.Table.from_pylist([row]).schema.with_metadata(metadata)
    path = table(tmp_path, [row], schema).replace("parquet", suffix)
    names = ("list", "sequence", "objects/pet", "inner/pet", "inner/_type")
    example = open_source(DataConfig(path, captions=names, access="random"), "train")[0]
    expected = [["dog", "cat"], ["cat"], ["dog", "dog"], "dog", "a"]
    assert [example[name] for name in names] == expected


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_number_that_names_no_class_is_a_bad_sample(tmp_path, suffix):
    rows = [{"image": jpeg(0), "label": label} for label in (1, -1, 7, None)]
    path = table(tmp_path, rows, labelled_schema(["cat", "dog"])).replace("parquet", suffix)
    source = open_source(DataConfig(path, label="label"), "train")
    assert source[0]["label"] == "dog"
    for index, label in ((1, "-1"), (2, "7")):
        with pytest.raises(BadSample, match=f"the label {label}, but there are 2 classes"):
            source[index]
    assert source[3]["label"] is None


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_files_that_name_their_classes_otherwise_are_refused(tmp_path, suffix):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        table(tmp_path, [{"image": b"", "label": 0}], labelled_schema(classes), f"{name}.parquet")
    with pytest.raises(DataError, match="other class names of 'label'"):
        open_source(DataConfig(str(tmp_path / f"*.{suffix}"), label="label"), "train")
    assert len(open_source(DataConfig(str(tmp_path / f"a.{suffix}"), label="label"), "train")) == 1


def test_rows_chosen_by_indices_are_refused(tmp_path):
    state = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="selected or shuffled by a list of indices"):
        open_source(DataConfig(str(tmp_path)), "train")
