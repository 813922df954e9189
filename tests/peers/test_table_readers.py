"""Tables that pandas and `datasets` write, read by them and by vlm: equal row by row."""

import csv
import random

import pytest

pytestmark = pytest.mark.peers

ALPHABET = "ab \"',\t\n\u2028\x85\x0c\u00e9\u732b"


def texts(count):
    rng = random.Random(0)
    made = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 12))) for _ in range(count)]
    return [text if text.strip() else "blank" for text in made]


def read(path):
    from vlm.config import DataConfig
    from vlm.data.sources import open_source

    source = open_source(DataConfig(str(path)), "train")
    return [source[i] for i in range(len(source))]


WRITERS = {
    "a.csv": {},
    "all.csv": {"quoting": csv.QUOTE_ALL},
    "crlf.csv": {"lineterminator": "\r\n"},
    "a.tsv": {"sep": "\t"},
    "mark.csv": {"encoding": "utf-8-sig"},
    "wide.csv": {"encoding": "utf-16"},
    "a.csv.gz": {},
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_pandas_writes(tmp_path, name):
    pandas = pytest.importorskip("pandas")
    made = texts(400)
    frame = pandas.DataFrame({"image": [f"{i}.jpg" for i in range(len(made))], "caption": made})
    options = WRITERS[name]
    frame.to_csv(tmp_path / name, index=False, **options)
    how = {key: options[key] for key in ("sep", "encoding") if key in options}
    expected = pandas.read_csv(tmp_path / name, keep_default_na=False, **how)["caption"].tolist()
    assert [row["caption"] for row in read(tmp_path / name)] == expected == made


@pytest.mark.parametrize("lines", [True, False])
def test_what_pandas_and_datasets_write_as_json(tmp_path, lines):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = [
        {"image": f"{i}.jpg", "caption": [text, text[::-1]], "info": {"en": text, "id": i}}
        for i, text in enumerate(texts(100))
    ]
    path, other = tmp_path / "a.json", tmp_path / "b.jsonl"
    pandas.DataFrame(rows).to_json(path, orient="records", lines=lines, force_ascii=False)
    datasets.Dataset.from_list(rows).to_json(other, lines=lines, force_ascii=False)
    for file in (path, other):
        found = read(file)
        assert [row["caption"] for row in found] == [row["caption"] for row in rows]
        assert [row["info/en"] for row in found] == [row["info"]["en"] for row in rows]
        again = datasets.load_dataset("json", data_files=str(file), cache_dir=tmp_path / "cache")
        assert [row["caption"] for row in again["train"]] == [row["caption"] for row in found]
