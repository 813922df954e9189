"""CSV, TSV and JSON as others write them, compared with Python's csv and pyarrow row by row."""

import codecs
import csv
import gzip
import io
import json
import random

import pyarrow.csv
import pyarrow.json
import pytest
from kinds import PREPROCESS, TOKENIZER, jpeg

from vlm.config import DataConfig
from vlm.data import table
from vlm.data.delimited import read_delimited
from vlm.data.examples import captions_of
from vlm.data.faults import BadSample
from vlm.data.pipeline import train_batches
from vlm.data.sources import kind_of, open_source
from vlm.errors import DataError

CAPTIONS = [
    "a dog", "a dog, red", 'the "best" dog', '"quoted"', "two\nlines, one row", "tab\there",
    "Käse \u2028 \x85 \x0c \x1c line", "x" * 200_000, "", " ", "\ufeffmark", "nul\0", "'",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    table._read.cache_clear()


def read(path, **options):
    config = DataConfig(str(path), **options)
    source = open_source(config, "train")
    return [source[i] for i in range(len(source))]


def captions(path, **options):
    return [row["caption"] for row in read(path, **options)]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_what_csv_writes_is_what_it_reads(tmp_path, suffix, encoding, ending):
    out = io.StringIO()
    delimiter = "\t" if "tsv" in suffix else ","
    writer = csv.DictWriter(out, ["image", "caption"], delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows({"image": f"{i}.jpg", "caption": text} for i, text in enumerate(CAPTIONS))
    data = out.getvalue().encode(encoding)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    csv.field_size_limit(1 << 30)
    text = io.StringIO(out.getvalue(), newline="")
    expected = [row["caption"] for row in csv.DictReader(text, delimiter=delimiter)]
    assert captions(path) == expected == CAPTIONS


def web_captions(count, seed):
    rng = random.Random(seed)
    words = ['"a', 'dog"', "the", '"', "red,", '5"', "house", '"best"', "ever"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_an_unquoted_tsv_of_the_web_loses_no_row(tmp_path, seed, caplog):
    texts = web_captions(400, seed)
    path = tmp_path / "web.tsv"
    path.write_text("image\tcaption\n" + "".join(f"{i}.jpg\t{t}\n" for i, t in enumerate(texts)))
    expected = pyarrow.csv.read_csv(
        path, parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
    )
    assert captions(path) == expected["caption"].to_pylist() == texts
    assert "is read as 401 rows, 0 of them broken (quotation marks are part" in caplog.text


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_rows_between_two_quotation_marks_are_counted(tmp_path, suffix, caplog):
    """Every reader by RFC 4180 takes rows 2 to 4 for one, with the right number of fields."""
    d = "\t" if suffix == ".tsv" else ","
    rows = [
        ("0.jpg", "a"),
        ("1.jpg", '"the best'),
        ("2.jpg", "b"),
        ("3.jpg", 'day"'),
        ("4.jpg", "c"),
    ]
    text = f"image{d}caption\n" + "".join(f"{d.join(row)}\n" for row in rows)
    assert len(list(csv.reader(io.StringIO(text), delimiter=d))) == 4
    (tmp_path / f"a{suffix}").write_text(text)
    assert captions(tmp_path / f"a{suffix}") == [caption for _, caption in rows]
    assert "is read as 6 rows" in caplog.text
    assert "not as 4 rows" in caplog.text


@pytest.mark.parametrize(("suffix", "d"), [(".csv", ","), (".tsv", "\t")])
def test_captions_of_several_lines_stay_whole(tmp_path, suffix, d, caplog):
    """Each of their lines has as many fields as the header, and names no image."""
    text = f'image{d}caption\n0.jpg{d}"a dog\nruns{d}fast"\n1.jpg{d}a cat\n'
    (tmp_path / f"a{suffix}").write_text(text)
    assert captions(tmp_path / f"a{suffix}") == [f"a dog\nruns{d}fast", "a cat"]
    assert "is read as 3 rows" in caplog.text


@pytest.mark.parametrize("dialect", ["excel", "excel-tab"])
def test_a_thousand_small_quoted_tables_are_what_csv_reads(dialect):
    rng = random.Random(0)
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        for _ in range(500):
            texts = ["".join(rng.choices('ab ",\t\n', k=rng.randint(0, 9))) for _ in range(4)]
            rows = [["image", "caption"], *([f"{i}.jpg", text] for i, text in enumerate(texts))]
            out = io.StringIO(newline="")
            csv.writer(out, dialect, quoting=quoting).writerows(rows)
            found = read_delimited(out.getvalue(), csv.get_dialect(dialect).delimiter, "a")
            assert [row.fields for row in found] == rows


def test_an_unclosed_quote_costs_its_own_row(tmp_path, caplog):
    rows = [f'{i}.jpg,"a dog, number {i}"' for i in range(40)]
    rows[17] = '17.jpg,"a dog, number 17'
    (tmp_path / "a.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    source = open_source(DataConfig(str(tmp_path / "a.csv")), "train")
    assert len(source) == 40
    for i in range(40):
        if i == 17:
            with pytest.raises(BadSample, match=r"line 19 of .*a.csv has another number of fields"):
                source[i]
        else:
            assert source[i]["caption"] == f"a dog, number {i}"
    assert "1 of 40 rows of" in caplog.text
    (tmp_path / "b.csv").write_text("image,caption\n" + "\n".join(rows[15:18] * 5) + "\n")
    with pytest.raises(DataError, match=r"5 of the 15 rows of .*b\.csv cannot be used: line 4 of"):
        open_source(DataConfig(str(tmp_path / "b.csv")), "train")


def test_a_table_whose_every_field_is_quoted_stays_so_but_for_a_broken_line(tmp_path):
    """Read without quotes each line has two fields, but their quotation marks are no text."""
    rows = [f'"{i}.jpg","a dog"' for i in range(40)]
    rows[17] = '"17.jpg","a dog'
    (tmp_path / "a.csv").write_text('"image","caption"\n' + "\n".join(rows) + "\n")
    source = open_source(DataConfig(str(tmp_path / "a.csv")), "train")
    assert [source[i]["caption"] for i in range(40) if i != 17] == ["a dog"] * 39
    with pytest.raises(BadSample, match=r"line 19 of"):
        source[17]


def test_a_broken_row_is_counted_and_named_in_a_run(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    rows = [json.dumps({"image": f"{i}.jpg", "caption": f"picture {i}"}) for i in range(12)]
    rows[5] = rows[5][:-3]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    config = DataConfig(str(tmp_path / "a.jsonl"), eval_split=None, max_bad_share=1.0, prefetch=0)
    iterator = train_batches(config, PREPROCESS, TOKENIZER, batch_size=4, seed=0)
    for _ in range(6):
        next(iterator)
    assert iterator.bad.kinds["broken row"] >= 2


# --------------------------------------------------------------------------- no header

CC3M = "a very typical bus station\thttp://lh6.ggpht.com/-Iv/IMG.JPG?imgmax=800\n"
CC12M = "https://us.123rf.com/450wm/p.jpg?ver=6\tMetal Design Within Reach Ivory\n"


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        (CC3M * 3, "column1 .such as 'a very typical.*column2 .an address, such as 'http://lh6"),
        (CC12M * 3, "column1 .an address, such as 'https://us.*column2 .such as 'Metal Design"),
    ],
)
def test_addresses_without_a_header_name_their_columns_and_the_way(tmp_path, text, columns):
    (tmp_path / "cc.tsv").write_text(text)
    with pytest.raises(DataError, match=f"no header and no images: its columns are {columns}"):
        read(tmp_path / "cc.tsv")
    with pytest.raises(DataError, match="download the images with img2dataset --url_list"):
        read(tmp_path / "cc.tsv")
    (tmp_path / "with.tsv").write_text("url\tcaption\n" + CC12M)
    with pytest.raises(DataError, match=r"no feature 'image'.*; url holds addresses: download"):
        read(tmp_path / "with.tsv")
    assert captions(tmp_path / "with.tsv", image="url") == ["Metal Design Within Reach Ivory"]


@pytest.mark.parametrize("swapped", [False, True])
def test_paths_without_a_header_are_columns_by_rule_or_by_name(tmp_path, swapped, caplog):
    pairs = [(f"{i}.jpg", f"a dog, {i}") for i in range(3)]
    for name, _ in pairs:
        (tmp_path / name).write_bytes(jpeg(0))
    rows = [pair[::-1] if swapped else pair for pair in pairs]
    (tmp_path / "a.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    found = read(tmp_path / "a.tsv")
    assert [row["caption"] for row in found] == [text for _, text in pairs]
    assert [row["image"] for row in found] == [str(tmp_path / name) for name, _ in pairs]
    image, caption = ("column2", "column1") if swapped else ("column1", "column2")
    assert (
        f"has no header: {image}, which has file names, is used as image, and {caption}"
        in caplog.text
    )
    found = read(tmp_path / "a.tsv", image=image, captions=(caption,))
    assert [row[caption] for row in found] == [text for _, text in pairs]
    (tmp_path / "b.tsv").write_text("".join(f"{name}\t{text}\tmore\n" for name, text in pairs))
    message = r'name them, for example data.image="column1" and data.captions=\("column2",\)'
    with pytest.raises(DataError, match=message):
        read(tmp_path / "b.tsv")
    assert len(read(tmp_path / "b.tsv", image="column1", captions=("column2", "column3"))) == 3


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption,caption\nx.jpg,a,b\n")
    with pytest.raises(DataError, match="two columns 'caption'"):
        read(tmp_path / "a.csv")


# -------------------------------------------------------------------------------- JSON


def test_lines_of_json_end_at_line_feeds_alone(tmp_path):
    texts = ["one\u2028two", "next\x85line", "form\x0cfeed", "\u2029", "plain"]
    lines = [json.dumps({"image": "a", "caption": t}, ensure_ascii=False) for t in texts]
    for name, ending in (("a.jsonl", "\n"), ("b.ndjson", "\r\n"), ("c.json", "\n")):
        (tmp_path / name).write_bytes(ending.join(lines).encode())
        assert captions(tmp_path / name) == texts
    assert pyarrow.json.read_json(tmp_path / "a.jsonl")["caption"].to_pylist() == texts
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert captions(tmp_path / "d.jsonl.gz") == texts
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-9])
    with pytest.raises(DataError, match=r"e\.jsonl\.gz is a truncated or corrupt gzip file"):
        read(tmp_path / "e.jsonl.gz")
    (tmp_path / "f.jsonl").write_bytes(codecs.BOM_UTF16_LE + "\n".join(lines).encode("utf-16-le"))
    assert captions(tmp_path / "f.jsonl") == texts


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_list_of_objects(tmp_path, suffix):
    items = [{"image": f"{i}.jpg", "caption": f"text {i}"} for i in range(4)]
    (tmp_path / f"a{suffix}").write_text(json.dumps(items, indent=1))
    assert captions(tmp_path / f"a{suffix}") == [f"text {i}" for i in range(4)]
    (tmp_path / f"b{suffix}").write_text(json.dumps(items, indent=1)[:-5])
    with pytest.raises(DataError, match=r"b\.json.* is not JSON"):
        read(tmp_path / f"b{suffix}")


def test_values_that_are_no_texts(tmp_path):
    rows = [
        {"image": "0.jpg", "caption": None},
        {"image": "1.jpg"},
        {"image": "2.jpg", "caption": float("nan")},
        {"image": "3.jpg", "caption": ["", None, "a"]},
        {"image": 4, "caption": "number"},
        {"image": None, "caption": "none"},
        {"image": {"path": "6.jpg", "bytes": None}, "caption": "a"},
        *({"image": f"{i}.jpg", "caption": [{"text": "a", "id": 1}]} for i in range(7, 60)),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(str(tmp_path / "a.jsonl"), captions=("caption", "caption/text"))
    source = open_source(config, "train")
    for index, why in enumerate(
        ["no caption"] * 3 + [None] + ["names no image in image but 4", "but None", None]
    ):
        if why is None:
            assert captions_of(source[index], config) == ["a"]
        else:
            with pytest.raises(BadSample, match=why):
                captions_of(source[index], config)
    assert captions_of(source[20], config) == ["a"]
    assert source[6]["image"] == str(tmp_path / "6.jpg")


def test_rows_of_no_split_are_left_out_and_counted(tmp_path, caplog):
    values = ["train", float("nan"), "test", None, "", 2, "train"]
    rows = [{"image": "a", "caption": str(i), "split": v} for i, v in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(tmp_path / "a.jsonl") == ["0", "6"]
    assert "3 rows of no split" in caplog.text
    with pytest.raises(DataError, match="no split 'dev': it has 2, test, train"):
        open_source(DataConfig(str(tmp_path / "a.jsonl")), "dev")


# -------------------------------------------------------------------------------- COCO


def coco(folder, images, name="annotations/captions_val2017.json"):
    (folder / images).mkdir(parents=True, exist_ok=True)
    held = {"info": {}, "licenses": [], "images": [], "annotations": []}
    for i in range(3):
        file = f"{i:012d}.jpg"
        (folder / images / file).write_bytes(jpeg(i))
        held["images"].append({"id": 100 - i, "file_name": file, "coco_url": f"http://x/{file}"})
        for k in range(2):
            own = {"image_id": 100 - i, "id": 10 * i + k, "caption": f"caption {i} {k}"}
            held["annotations"].insert(0, own)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held))
    return path


@pytest.mark.parametrize("images", ["val2017", "images/val2017", "images", "annotations", "else"])
def test_captions_of_coco_find_their_images(tmp_path, images, caplog):
    path = coco(tmp_path, images)
    options = {"data_dir": str(tmp_path / "else")} if images == "else" else {}
    found = read(path, **options)
    for i, row in enumerate(found):
        assert row["image"] == str(tmp_path / images / f"{i:012d}.jpg")
        assert sorted(row["caption"]) == [f"caption {i} 0", f"caption {i} 1"]
    assert len(found) == 3
    assert (str(tmp_path / images) in caplog.text) == (images != "annotations")


def test_coco_by_its_splits_and_other_annotations(tmp_path):
    coco(tmp_path, "train2017", "annotations/captions_train2017.json")
    coco(tmp_path, "val2017")
    config = DataConfig(str(tmp_path / "annotations" / "captions_{split}2017.json"))
    assert "train2017" in open_source(config, "train")[0]["image"]
    assert "val2017" in open_source(config, "validation")[0]["image"]
    instances = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(DataError, match=r"without 'caption': name COCO's captions_\*\.json"):
        read(tmp_path / "instances.json")


def test_splits_of_karpathy(tmp_path):
    images = [
        {"filepath": "val2014", "filename": f"{i}.jpg", "split": split,
         "sentences": [{"raw": f"a {i}", "tokens": ["a"]}, {"raw": f"b {i}"}]}
        for i, split in enumerate(["train", "test", "train"])
    ]  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    found = read(tmp_path / "dataset_coco.json")
    assert [row["caption"] for row in found] == [["a 0", "b 0"], ["a 2", "b 2"]]
    assert found[0]["image"] == str(tmp_path / "val2014" / "0.jpg")


def test_kinds_of_tables_by_name():
    for name in ("a.csv", "a.TSV", "a.jsonl.gz", "a.ndjson", "captions_val2017.json"):
        assert kind_of(name) == "table"
    for name in ("a.csv.zst", "a.txt"):
        assert kind_of(name) is None


def test_a_table_that_changed_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a", "caption": "x"}\n' * 30 + "{")
    assert len(open_source(DataConfig(str(path)), "train")) == 31
    path.write_text('{"image": "a", "caption": "new"}\n')
    assert captions(path) == ["new"]
