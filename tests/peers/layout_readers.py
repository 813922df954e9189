"""The layouts of tests/data/layouts, read by libraries that are not ours."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "layouts"))
from layouts import LAYOUTS, Item, Pair, by_pillow, expected

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".tiff", ".jp2")
IMAGES += (".ppm", ".qoi", ".jfif", ".tif", ".heic", ".jxl")


def shards(folder: Path, pattern: str = "*.tar") -> Iterator[dict[str, bytes]]:
    """The examples of tar files, as webdataset groups their members."""
    import webdataset

    for path in sorted(folder.glob(pattern)):
        for example in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
            yield {k: v for k, v in example.items() if not k.startswith("__")}


def image_of(example: dict[str, bytes]) -> str:
    (data,) = (data for name, data in example.items() if f".{name}".lower().endswith(IMAGES))
    return by_pillow(data)


def _tar(folder: Path) -> Iterator[Pair]:
    for example in shards(folder):
        (text,) = (data for name, data in example.items() if name.endswith("txt"))
        yield image_of(example), (text.decode(),)


def _recaption(folder: Path) -> Iterator[Pair]:
    for example in shards(folder):
        yield image_of(example), (json.loads(example["json"])["re_caption"],)


def _labelled(folder: Path) -> Iterator[Pair]:
    for example in shards(folder):
        yield image_of(example), (example["cls"].decode(),)


def _clip_benchmark(folder: Path) -> Iterator[Pair]:
    names = (folder / "classnames.txt").read_text().split()
    for example in shards(folder / "train"):
        yield image_of(example), (names[int(example["cls"])],)


def _pictures(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGES)


def _files(folder: Path) -> Iterator[Pair]:
    for path in _pictures(folder):
        fields = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        yield by_pillow(path.read_bytes()), (fields["re_caption"],)


def _beside(folder: Path) -> Iterator[Pair]:
    for path in _pictures(folder):
        lines = path.with_suffix(".txt").read_text(encoding="utf-8").split("\n")
        yield by_pillow(path.read_bytes()), tuple(line for line in lines if line)


def _classes(folder: Path) -> Iterator[Pair]:
    for path in _pictures(folder):
        yield by_pillow(path.read_bytes()), (path.parent.name,)


def _table(folder: Path, name: str, delimiter: str) -> Iterator[Pair]:
    with open(folder / name, newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f, delimiter=delimiter):
            yield by_pillow((folder / row["image"]).read_bytes()), (row["caption"],)


def _jsonl(folder: Path) -> Iterator[Pair]:
    with open(folder / "rows.jsonl", encoding="utf-8") as f:
        for row in map(json.loads, f):
            yield by_pillow((folder / row["image"]).read_bytes()), (row["re_caption"],)


def _parquet_paths(folder: Path) -> Iterator[Pair]:
    import pyarrow.parquet

    for row in pyarrow.parquet.read_table(folder / "a.parquet").to_pylist():
        yield by_pillow((folder / row["image"]).read_bytes()), (row["caption"],)


def _datasets(made) -> Iterator[Pair]:
    import datasets

    made = made.cast_column("image", datasets.Image(decode=False))
    for row in made:
        yield by_pillow(row["image"]["bytes"]), tuple(row["caption"])


def _parquet_bytes(folder: Path) -> Iterator[Pair]:
    import datasets

    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    cache = str(folder.parent / "cache")
    return _datasets(
        datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    )


def _arrow(folder: Path) -> Iterator[Pair]:
    import datasets

    return _datasets(datasets.load_from_disk(str(folder)))


def records(folder: Path) -> Iterator[dict[str, list]]:
    """The records of ArrayRecord files: every feature a list."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorflow_datasets.proto import tf_example_pb2

    source = ArrayRecordDataSource([str(p) for p in sorted(folder.glob("*.array_record"))])
    for i in range(len(source)):
        features = tf_example_pb2.Example.FromString(source[i]).features.feature
        yield {k: list(getattr(f, f.WhichOneof("kind")).value) for k, f in features.items()}


def _array_record(folder: Path) -> Iterator[Pair]:
    for record in records(folder):
        yield by_pillow(record["image"][0]), tuple(text.decode() for text in record["caption"])


def _tfds(folder: Path) -> Iterator[Pair]:
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    builder = tfds.builder_from_directory(str(folder / "layouts" / "1.0.0"))
    for example in builder.as_data_source("train", decoders=decoders):
        yield by_pillow(example["image"]), (example["caption"].decode(),)


READERS = {
    "img2dataset tar": (_tar, "webdataset"),
    "img2dataset tar, re_caption": (_recaption, "webdataset"),
    "tar, keys with dots": (_tar, "webdataset"),
    "tar with cls": (_labelled, "webdataset"),
    "CLIP_benchmark": (_clip_benchmark, "webdataset"),
    "img2dataset files": (_files, "pathlib"),
    "texts beside": (_beside, "pathlib"),
    "class folders": (_classes, "pathlib"),
    "captions.csv": (lambda folder: _table(folder, "captions.csv", ","), "csv"),
    "csv": (lambda folder: _table(folder, "rows.csv", ","), "csv"),
    "tsv": (lambda folder: _table(folder, "rows.tsv", "\t"), "csv"),
    "jsonl": (_jsonl, "json"),
    "parquet of paths": (_parquet_paths, "pyarrow"),
    "parquet of bytes": (_parquet_bytes, "datasets"),
    "arrow": (_arrow, "datasets"),
    "array_record": (_array_record, "array_record"),
    "tfds": (_tfds, "tfds"),
}


def reference(name: str, folder: Path, found: list[Item]) -> str:
    """The library that reads the same pairs of a layout as were written, and as vlm must read.

    Raises:
        AssertionError: it reads others.
    """
    read, library = READERS[name]
    assert sorted(read(folder)) == sorted(expected(LAYOUTS[name], found)), (name, library)
    return library
