"""Files that other tools wrote: img2dataset, TFDS with TensorFlow, COCO and Flickr30k.

The scripts that wrote golden/img2dataset and golden/tfds are beside these folders.
"""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import logging
import shutil
import zlib
from pathlib import Path

import kinds
import pyarrow
import pyarrow.parquet
import pytest
from kinds import PREPROCESS, TOKENIZER, jpeg

from vlm.config import DataConfig
from vlm.data.pipeline import train_batches
from vlm.data.sources import kind_of, open_source, split_names, streams
from vlm.data.storage import read_file
from vlm.data.tfrecord import masked_crc32c
from vlm.errors import DataError

GOLDEN = Path(__file__).parent / "golden"
IMG2DATASET = GOLDEN / "img2dataset"
DIGESTS = json.loads((IMG2DATASET / "digests.json").read_text())
DOWNLOADED = {  # kind, and fields of the config
    "webdataset": ("tar", {}),
    "parquet": ("parquet", {"image": "jpg"}),
    "files": ("folder", {}),
    "tfrecord": ("tfrecord", {"image": "jpg"}),
}
ANIMALS = str(GOLDEN / "tfds" / "animals" / "1.0.0")


def text_of(value) -> str:
    return value[0] if isinstance(value, list) else value


def digests(config: DataConfig) -> dict[str, str]:
    """The digest of the image of each caption."""
    source = open_source(config, "train")
    found = {}
    for i in range(len(source)):
        image = source[i][config.image]
        data = image if isinstance(image, bytes) else read_file(image)
        found[text_of(source[i][config.captions[0]])] = hashlib.sha256(data).hexdigest()
    assert len(found) == len(source)
    return found


def fails(config: DataConfig, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        open_source(config, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------- img2dataset


@pytest.mark.parametrize("form", DOWNLOADED)
def test_every_format_of_img2dataset(form):
    kind, fields = DOWNLOADED[form]
    config = DataConfig(str(IMG2DATASET / form), access="random", **fields)
    assert kind_of(config.source) == kind
    assert digests(config) == DIGESTS
    assert digests(dataclasses.replace(config, source=f"{config.source}/")) == DIGESTS


def test_failed_downloads_are_no_samples_of_a_stream(caplog):
    config = DataConfig(
        str(IMG2DATASET / "parquet"), image="jpg", eval_split=None, prefetch=0, access="stream",
        interleave=1, max_bad_share=0.0,
    )  # fmt: skip
    assert streams(dataclasses.replace(config, access="auto"))
    iterator = train_batches(config, PREPROCESS, TOKENIZER, batch_size=3, seed=0)
    epochs = [kinds.numbers_of(b) for b in itertools.islice(iterator, 4)]
    iterator.close()
    wanted = sorted(int(text.split()[-1]) for text in DIGESTS)
    assert sorted(epochs[0] + epochs[1]) == sorted(epochs[2] + epochs[3]) == wanted
    with caplog.at_level(logging.WARNING, "vlm"):
        open_source(dataclasses.replace(config, access="random", interleave=None), "train")
    assert "2 of 8 rows could not be downloaded" in caplog.text


def test_the_image_column_of_img2dataset_is_named():
    config = DataConfig(str(IMG2DATASET / "parquet"), access="random")
    assert fails(config).endswith("url, width: set data.image to 'jpg'")


COMMAND = (
    "img2dataset --url_list {} --input_format {} --url_col {} --caption_col {} --output_format "
    "webdataset --output_folder shards --image_size 384 --resize_mode keep_ratio, and train with "
    "--data.source shards/"
)


@pytest.mark.parametrize("captions", [("caption",), ("TEXT",)])
def test_a_parquet_table_of_addresses(tmp_path, captions):
    table = IMG2DATASET / "urls.parquet"
    message = fails(DataConfig(str(table), captions=captions))
    assert message.endswith(f"URL holds addresses: download the images with {command(table)}")
    for n in range(2):
        (tmp_path / f"part-{n}.parquet").write_bytes(table.read_bytes())
    message = fails(DataConfig(f"{tmp_path}/*.parquet", captions=captions))
    assert message.endswith(command(tmp_path))


def command(table, form="parquet", url="URL", caption="TEXT") -> str:
    return COMMAND.format(table, form, url, caption)


@pytest.mark.parametrize(
    ("name", "line", "form", "columns"),
    [
        ("cc12m.tsv", "https://a.b/0.jpg\ta cat", "tsv", r"url\tcaption"),
        ("Train_GCC-training.tsv", "a cat\thttps://a.b/0.jpg", "tsv", r"caption\turl"),
        ("laion.csv", "https://a.b/0.jpg,a cat", "csv", "url,caption"),
    ],
)
def test_a_table_of_addresses_without_a_header(tmp_path, name, line, form, columns):
    path = tmp_path / name
    path.write_text(f"{line}\n" * 3)
    message = fails(DataConfig(str(path)))
    assert f"name the columns in its first line, as by sed -i '1i {columns}' {path}" in message
    assert message.endswith(command(path, form, "url", "caption"))


def test_a_table_of_addresses_with_a_header(tmp_path):
    path = tmp_path / "sbu.csv"
    path.write_text("image_url,text,width\nhttps://a.b/0.jpg,a cat,3\n")
    assert fails(DataConfig(str(path))).endswith(command(path, "csv", "image_url", "text"))


# ------------------------------------------------------------------------------------- TFRecord


def animals(**fields) -> DataConfig:
    return DataConfig(ANIMALS, captions=("captions/text",), **fields)


def test_tfds_in_tfrecord_files():
    assert kind_of(ANIMALS) == "tfds"
    assert split_names(animals()) == ["test", "train"]
    for config in (
        animals(),
        dataclasses.replace(animals(), source=f"tfds:{ANIMALS}"),
        dataclasses.replace(animals(), source="tfds:animals", data_dir=str(GOLDEN / "tfds")),
    ):
        for split, numbers in (
            ("train", range(5)),
            ("test", range(5, 7)),
            ("train+test", range(7)),
        ):
            source = open_source(config, split)
            found = {}
            for i in range(len(source)):
                texts = source[i]["captions/text"]
                number = int(texts[0].split()[-1])
                assert texts == [f"picture {number}", f"number {number}"]
                found[number] = source[i]["image"], source[i]["label"]
            assert found.keys() == set(numbers)
            assert all(
                image == jpeg(n) and int(label) == n % 2 for n, (image, label) in found.items()
            )
    parts = [open_source(animals(), split) for split in ("train[:2]", "train[2:]")]
    assert [len(part) for part in parts] == [2, 3]
    whole = open_source(animals(), "train")
    order = [part[i]["captions/id"][0] for part in parts for i in range(len(part))]
    assert order == [whole[i]["captions/id"][0] for i in range(5)]
    labelled = open_source(DataConfig(ANIMALS, label="label"), "train")
    assert {labelled[i]["label"] for i in range(5)} == {"cat", "dog"}


def test_tfrecord_files_by_name():
    config = dataclasses.replace(animals(), source=f"{ANIMALS}/animals-{{split}}.tfrecord*")
    assert kind_of(config.source) == "tfrecord"
    source = open_source(config, "train")
    assert {source[i]["captions/text"][0] for i in range(5)} == {f"picture {i}" for i in range(5)}


def test_checksum():
    """The length of a record and its checksum, as TensorFlow wrote them."""
    data = next(Path(ANIMALS).glob("*train.tfrecord*")).read_bytes()
    assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")


def test_damaged_tfrecord_files(tmp_path, caplog):
    data = (IMG2DATASET / "tfrecord" / "00000.tfrecord").read_bytes()
    config = DataConfig(str(tmp_path / "a.tfrecord"), image="jpg")

    def write(written: bytes) -> None:
        (tmp_path / "a.tfrecord").write_bytes(written)

    write(data[:-9])
    with caplog.at_level(logging.WARNING, "vlm"):
        assert len(open_source(config, "train")) == len(DIGESTS) - 3
    assert "it ends inside of record 3" in caplog.text
    write(data[:5])
    assert "it ends inside of record 0" in fails(config)
    write(data[:8] + b"abcd" + data[12:])
    assert "the length of record 0 is corrupt" in fails(config)
    for packed in (gzip.compress(data), zlib.compress(data)):
        write(packed)
        assert "it is compressed, or not a TFRecord file: write it without" in fails(config)
    write(b"")
    assert "holds no records: check data.source" in fails(config)
    assert "there is no shard" in fails(dataclasses.replace(config, source="gone.tfrecord"))


def test_a_tfds_file_that_lost_records(tmp_path):

    folder = tmp_path / "animals" / "1.0.0"
    shutil.copytree(ANIMALS, folder)
    for path in folder.glob("*train.tfrecord*"):
        path.write_bytes(path.read_bytes()[:-5])
    message = fails(dataclasses.replace(animals(), source=str(folder)))
    assert message.endswith("of its 2 records: prepare the data set again")


BUILDER = '''
import tensorflow_datasets as tfds

class {name}(tfds.core.GeneratorBasedBuilder):
    """Numbered pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {{"image": tfds.features.Image(), "caption": tfds.features.Text()}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {{"train": self._generate_examples()}}

    def _generate_examples(self):
        for n in range(4):
            yield n, {{"image": {image!r}, "caption": f"picture {{n}}"}}

class NoBuilder:
    pass

class Broken(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        raise ValueError("no info")

    def _split_generators(self, dl_manager):
        return {{}}

    def _generate_examples(self):
        return iter(())
'''


def test_a_builder_of_the_user(tmp_path, monkeypatch):
    pytest.importorskip("importlib_resources")  # TFDS prepares a builder of a package with it
    package = tmp_path / "my_builders"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "numbered.py").write_text(BUILDER.format(name="NumberedPictures", image=jpeg(0)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_builders.numbered as module  # pyright: ignore[reportMissingImports]

    config = DataConfig("tfds:my_builders.numbered.NumberedPictures", data_dir=str(tmp_path))
    message = fails(config)
    assert "is not prepared in" in message
    assert message.endswith(
        'or run NumberedPictures(file_format="array_record").download_and_prepare()'
    )
    built = module.NumberedPictures(data_dir=str(tmp_path), file_format="array_record")
    built.download_and_prepare()
    colon = "tfds:my_builders.numbered:NumberedPictures"
    for name in (config.source, colon, "tfds:numbered_pictures"):
        source = open_source(dataclasses.replace(config, source=name), "train")
        assert {source[i]["caption"] for i in range(4)} == {f"picture {i}" for i in range(4)}
    for name, why in (
        ("NoBuilder", "is not the class of a TFDS builder"),
        ("Broken", "cannot be made (ValueError: no info): correct it"),
    ):
        source = f"tfds:my_builders.numbered.{name}"
        assert why in fails(dataclasses.replace(config, source=source))


def test_a_folder_that_tfds_did_not_prepare():
    assert "has no dataset_info.json: name the folder of a version" in fails(
        DataConfig(f"tfds:{GOLDEN}/tfds/animals")
    )


# ------------------------------------------------------------------------------- COCO, Flickr30k


def coco(folder: Path, name: str, annotations: list[dict], **more) -> DataConfig:
    images = [{"id": n + 10, "file_name": f"{n}.jpg", "width": 12, "height": 10} for n in range(3)]
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "val2017").mkdir(exist_ok=True)
    for n in range(3):
        (folder / "val2017" / f"{n}.jpg").write_bytes(jpeg(n))
    path = folder / "annotations" / f"{name}_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return DataConfig(str(path))


def test_coco_captions_with_the_images_beside(tmp_path):
    annotations = [
        {"id": i, "image_id": 10 + i % 3, "caption": f"picture {i % 3}, {i // 3}"}
        for i in range(15)
    ]
    config = coco(tmp_path, "captions", annotations)
    source = open_source(config, "train")
    for n in range(3):
        assert source[n]["caption"] == [f"picture {n}, {i}" for i in range(5)]
        assert read_file(source[n]["image"]) == jpeg(n)


def test_coco_instances(tmp_path):
    classes = [{"id": 1, "name": "cat"}, {"id": 7, "name": "traffic light"}]
    shown = [(10, 7), (10, 1), (10, 7), (11, 1), (11, 1)]  # the third image shows none
    annotations = [{"id": i, "image_id": a, "category_id": b} for i, (a, b) in enumerate(shown)]
    config = coco(tmp_path, "instances", annotations, categories=classes)
    assert "has no feature 'caption' that data.captions names: it has category" in fails(config)
    source = open_source(dataclasses.replace(config, captions=("category",)), "train")
    assert [source[n]["category"] for n in range(3)] == [["traffic light", "cat"], ["cat"], []]
    message = fails(coco(tmp_path, "instances", [{"id": 0, "image_id": 10}], categories=classes))
    assert "has images and annotations without 'category_id': name COCO's captions_*" in message


def test_karpathy_split_and_its_restval(tmp_path, caplog):
    rows = [
        {"filename": f"{n}.jpg", "filepath": "val2014", "split": split, "cocoid": n,
         "sentences": [{"raw": f"picture {n}", "tokens": []}]}
        for n, split in enumerate(["train", "restval", "val", "test"])
    ]  # fmt: skip
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    for n in range(4):
        (tmp_path / "images" / "val2014" / f"{n}.jpg").write_bytes(jpeg(n))
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": rows, "dataset": "coco"}))
    config = DataConfig(str(path), data_dir=str(tmp_path / "images"))
    with caplog.at_level(logging.WARNING, "vlm"):
        source = open_source(config, "train")
    assert (len(source), read_file(source[0]["image"])) == (1, jpeg(0))
    assert "1 more training images in the split restval: data.train_split=train+restval" in (
        caplog.text
    )
    both = dataclasses.replace(config, train_split="train+restval")
    source = open_source(both, "train+restval")
    assert [source[i]["caption"] for i in range(2)] == [["picture 0"], ["picture 1"]]
    assert len(open_source(both, "test")) == 1
    assert "has no split 'nope'" in fails(config, "train+nope")


def test_the_list_of_flickr30k(tmp_path):
    (tmp_path / "flickr30k-images").mkdir()
    lines = []
    for n in range(3):
        (tmp_path / "flickr30k-images" / f"{n}.jpg").write_bytes(jpeg(n))
        lines += [f'{n}.jpg#{i}\tPicture {n}, the "{i}"th .' for i in range(5)]
    path = tmp_path / "results_20130124.token"
    for name in ("results_20130124.token", "Flickr8k.token.txt"):
        path = tmp_path / name
        path.write_text("\n".join([*lines, ""]))
        source = open_source(DataConfig(str(path)), "train")
        assert len(source) == 3
        assert source[1]["caption"] == [f'Picture 1, the "{i}"th .' for i in range(5)]
        assert read_file(source[1]["image"]) == jpeg(1)
    path.write_text("\n".join([*lines, "no tab", "x.jpg#0\t "]))
    assert "line 16 of" in fails(DataConfig(str(path), max_bad_share=0.0))


# ------------------------------------------------------------------------------ shapes of rows


def one_row(tmp_path, **row) -> str:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 2), out)
    (tmp_path / "rows.parquet").write_bytes(out.getvalue())
    return str(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("feature", "value", "texts"),
    [
        ("caption", ["a cat", "one cat"], ["a cat", "one cat"]),  # Flickr30k's
        ("sentences/raw", [{"raw": "a cat", "id": 1}, {"raw": "one cat", "id": 2}], None),
        ("sentences/raw", {"raw": ["a cat", "one cat"], "id": [1, 2]}, None),
    ],
)
def test_several_captions_in_a_row(tmp_path, feature, value, texts):
    name = feature.partition("/")[0]
    path = one_row(tmp_path, image={"bytes": jpeg(0), "path": None}, **{name: value})
    source = open_source(DataConfig(path, captions=(feature,), access="random"), "train")
    assert source[0][feature] == (texts or ["a cat", "one cat"])
    assert source[0]["image"] == jpeg(0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_list_of_images(tmp_path, count):
    from vlm.data.faults import BadSample

    image = {"bytes": jpeg(0), "path": None}
    out = io.BytesIO()
    rows = [{"image": [image] * n, "caption": "a cat"} for n in (1, count)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    (tmp_path / "rows.parquet").write_bytes(out.getvalue())
    config = DataConfig(str(tmp_path / "rows.parquet"), access="random")
    assert streams(dataclasses.replace(config, access="auto"))
    source = open_source(config, "train")
    assert source[0]["image"] == jpeg(0)
    if count == 1:
        assert source[1]["image"] == jpeg(0)
    else:
        with pytest.raises(BadSample, match=f"has {count} images in image, in place of one"):
            source[1]


def test_an_index_of_a_folder(tmp_path, capsys):
    from vlm.cli import main

    shutil.copytree(IMG2DATASET / "webdataset", tmp_path / "shards")
    assert main(["data", "index", f"{tmp_path}/shards/"]) == 0
    assert "6 examples in 2 shards" in capsys.readouterr().out
    assert len(list((tmp_path / "shards").glob("*.vlm-index"))) == 1
    assert digests(DataConfig(f"{tmp_path}/shards/")) == DIGESTS
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shutil.copy(IMG2DATASET / "webdataset" / "00000.tar", tmp_path / split)
    (tmp_path / "shards").rename(tmp_path / "train" / "more")
    shutil.copy(IMG2DATASET / "webdataset" / "00000.tar", tmp_path / "test.tar")
    assert main(["data", "index", str(tmp_path), "--out", str(tmp_path / "one")]) == 2
    assert "splits with an index each: leave out --out" in capsys.readouterr().err
