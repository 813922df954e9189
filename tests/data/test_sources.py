import io
import json
import pickle
import tarfile

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vlm.config import DataConfig
from vlm.data.examples import captions_of
from vlm.data.sources import all_captions, held_out, open_source, vocabulary_texts
from vlm.data.storage import expand
from vlm.errors import DataError


def picture(value: int, kind="PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(out, kind)
    return out.getvalue()


class TinyLabelled(tfds.core.GeneratorBasedBuilder):
    """Red squares with a label and two captions, as any user's TFDS data set might have them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["cat", "dog", "unseen"]),
                    "texts": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            label = ["cat", "dog"][i % 2]
            yield i, {"picture": picture(i), "label": label, "texts": [f"Käse {i}", f"two {i}"]}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    TinyLabelled(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_any_prepared_tfds_data_set_by_name(tiny_dir):
    config = DataConfig(
        "tfds:tiny_labelled", image="picture", captions=("texts",), data_dir=tiny_dir
    )
    source = open_source(config, "train")
    assert len(source) == 8
    example = source[3]
    number = Image.open(io.BytesIO(example["picture"])).getpixel((0, 0))[0]
    assert captions_of(example, config) == [f"Käse {number}", f"two {number}"]
    assert example["picture"][:4] == b"\x89PNG"
    assert len(open_source(config, "train[:3]")) == 3
    assert len(vocabulary_texts(config)) == 16
    copy = pickle.loads(pickle.dumps(source))
    assert captions_of(copy[3], config) == captions_of(example, config)


def test_a_label_makes_captions_by_templates(tiny_dir):
    config = DataConfig(
        "tfds:tiny_labelled",
        image="picture",
        label="label",
        templates=("a photo of a {}.", "{}"),
        data_dir=tiny_dir,
    )
    source = open_source(config, "test")
    assert captions_of(source[0] | {"label": "dog"}, config) == ["a photo of a dog.", "dog"]
    assert {source[i]["label"] for i in range(4)} == {"cat", "dog"}
    names = all_captions(config)
    assert names == ["a photo of a cat.", "a photo of a dog.", "a photo of a unseen."]
    expected = [["cat", "dog"].index(source[i]["label"]) for i in range(4)]
    assert held_out(config).tolist() == expected


def test_openmoji_candidates_and_answers(openmoji_dir):
    config = DataConfig("openmoji", data_dir=openmoji_dir, train_split="train+validation")
    captions, answers = all_captions(config), held_out(config)
    assert len(captions) == len(set(captions)) == 3944
    test = open_source(config, "test")
    assert [captions[i] for i in answers] == [test[i]["caption"] for i in range(len(test))]
    several = DataConfig(
        "openmoji", data_dir=openmoji_dir, captions=("caption", "caption_de", "aliases")
    )
    example = open_source(several, "train")[0]
    assert captions_of(example, several) == [
        example["caption"],
        example["caption_de"],
        *example["aliases"],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"captions": ("caption", "title")},
            r"no feature 'title' that data.captions names.*caption_de",
        ),
        ({"image": "picture"}, "no feature 'picture' that data.image names"),
        ({"captions": ()}, "captions is empty"),
        ({"label": "kind"}, "no feature 'kind' that data.label names"),
    ],
)
def test_features_that_are_not_there(openmoji_dir, changes, message):
    with pytest.raises(DataError, match=message):
        open_source(DataConfig("openmoji", data_dir=openmoji_dir, **changes), "train")


def test_sources_that_are_not_there(openmoji_dir, tiny_dir, tmp_path):
    with pytest.raises(DataError, match=r"'imagenet' is unknown: give \"openmoji\".*tfds:NAME"):
        open_source(DataConfig("imagenet"), "train")
    with pytest.raises(DataError, match="no split 'holdout': it has test, train, val"):
        open_source(DataConfig("openmoji", data_dir=openmoji_dir), "holdout")
    dev = open_source(DataConfig("openmoji", data_dir=openmoji_dir), "dev[:5]")
    assert [dev[i]["caption"] for i in range(5)] == [
        open_source(DataConfig("openmoji", data_dir=openmoji_dir), "validation")[i]["caption"]
        for i in range(5)
    ]
    with pytest.raises(DataError, match="TFDS knows no data set 'no_such_set'"):
        open_source(DataConfig("tfds:no_such_set", data_dir=tiny_dir), "train")
    with pytest.raises(DataError, match=r"is not prepared in .*array_record"):
        open_source(DataConfig("tfds:tiny_labelled", data_dir=str(tmp_path)), "train")
    with pytest.raises(DataError, match="eval_split is not set"):
        held_out(DataConfig("openmoji", data_dir=openmoji_dir, eval_split=None))


# ------------------------------------------------------------------------------ tables


def write_table(folder, suffix, rows):
    path = folder / f"captions{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        sep = "\t" if suffix == ".tsv" else ","
        lines = [sep.join(rows[0])] + [sep.join(f'"{v}"' for v in row.values()) for row in rows]
        path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_and_folders_with_one(tmp_path, suffix):
    rows = [
        {
            "image": f"images/{i}.png",
            "caption": f"a dog, {i}",
            "split": "test" if i == 2 else "train",
        }
        for i in range(4)
    ]
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i))
    table = write_table(tmp_path, suffix, rows)
    for path in (tmp_path, table):
        config = DataConfig(str(path))
        train = open_source(config, "train")
        assert [train[i]["caption"] for i in range(len(train))] == [
            "a dog, 0",
            "a dog, 1",
            "a dog, 3",
        ]
        assert Image.open(train[2]["image"]).getpixel((0, 0)) == (3, 0, 0)
        assert held_out(config).tolist() == [3]
        assert all_captions(config)[3] == "a dog, 2"


def test_tables_that_are_wrong(tmp_path):
    for name, text, message in [
        ("a.csv", "image,caption\nx.png\n", "line 2 of .*a.csv has another number of fields"),
        ("b.csv", "image,caption\nx.png,a dog, red\n", "line 2 .*quote"),
        ("c.csv", "image,caption\n", "no rows"),
        ("d.csv", "file,caption\nx.png,a\n", "no feature 'image'.*caption, file"),
        ("e.csv", "image,caption\n,a\n", "line 2 of .* names no image"),
        ("f.jsonl", '{"image": "x"', "line 1 of .*f.jsonl is not JSON"),
        ("g.jsonl", "[1]", "item 1 of .*g.jsonl is not an object"),
        (
            "h.jsonl",
            '{"image": "x", "caption": "a", "split": "val"}',
            "no split 'train': it has val",
        ),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            open_source(DataConfig(str(tmp_path / name)), "train")
    (tmp_path / "latin.csv").write_bytes("image,caption\nx,Käse\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text"):
        open_source(DataConfig(str(tmp_path / "latin.csv")), "train")
    with pytest.raises(DataError, match="no table"):
        open_source(DataConfig(str(tmp_path / "none.csv")), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no captions\.csv"):
        open_source(DataConfig(str(tmp_path / "empty")), "train")


# ------------------------------------------------------------------------- WebDataset


def write_shard(path, examples):
    with tarfile.open(path, "w") as tar:
        for name, data in examples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    for shard in range(3):
        examples = []
        for i in range(2):
            number = 2 * shard + i
            stem = f"part/{number:06d}"
            examples += [
                (f"{stem}.json", json.dumps({"title": f"title {number}"}).encode()),
                (f"{stem}.jpg", picture(number * 20, "JPEG")),
                (f"{stem}.txt", f"Käse {number}\n".encode()),
                (f"{stem}.cls", b"7"),
            ]
        examples.append(("alone.txt", b"a caption without its image"))
        write_shard(tmp_path / f"train-{shard:03d}.tar", examples)
    return tmp_path


@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar", "{split}-*.tar"])
def test_shards_have_random_access(shards, pattern):
    config = DataConfig(str(shards / pattern), captions=("caption", "title"), eval_split=None)
    for _ in range(2):  # headers, then the kept index
        source = pickle.loads(pickle.dumps(open_source(config, "train")))
        assert len(source) == 6
        for i in (5, 0, 3):
            example = source[i]
            assert captions_of(example, config) == [f"Käse {i}", f"title {i}"]
            red = Image.open(io.BytesIO(example["image"])).getpixel((0, 0))[0]
            assert red == pytest.approx(20 * i, abs=3)
    assert len(list((shards / "cache" / "shards").iterdir())) == 1


def test_a_changed_shard_is_read_again(shards):
    config = DataConfig(str(shards / "train-000.tar"))
    assert len(open_source(config, "train")) == 2
    write_shard(shards / "train-000.tar", [("x.png", picture(1)), ("x.txt", b"new")])
    assert open_source(config, "train")[0]["caption"] == "new"


def test_shards_that_are_wrong(shards):
    whole = (shards / "train-000.tar").read_bytes()
    (shards / "cut.tar").write_bytes(whole[:2000])
    (shards / "text.tar").write_text("no tar file " * 100)
    write_shard(shards / "bare.tar", [("x.txt", b"a caption")])
    write_shard(shards / "mute.tar", [("x.png", picture(1))])
    for name, message in [
        (
            "cut.tar",
            "cut.tar is broken: it ends by byte .* without an end-of-archive marker",
        ),
        ("text.tar", "text.tar is broken: a header is damaged, or this is not a tar file"),
        ("bare.tar", r"examples without an image: x \(txt\)"),
        ("none.tar", "no shard .*none.tar"),
        ("none-*.tar", "no shards .*none"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(DataConfig(str(shards / name)), "train")
    with pytest.raises(DataError, match=r"mute.tar has no feature 'caption'"):
        open_source(DataConfig(str(shards / "mute.tar")), "train")
    with pytest.raises(DataError, match=r"no \{split\} in it"):
        open_source(DataConfig(str(shards / "train-*.tar")), "test")


def test_ranges_expand_in_order():
    names = expand("gs://bucket/{0..1}/x-{08..11}.tar")
    assert names[:2] == ["gs://bucket/0/x-08.tar", "gs://bucket/0/x-09.tar"]
    assert len(names) == 8
