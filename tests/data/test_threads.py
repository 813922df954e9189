"""Every kind of source read by eight threads at once gives what one thread reads in order."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import kinds
import numpy as np
import pyarrow.parquet
import pytest
from kinds import PREPROCESS, TOKENIZER
from PIL import Image

from vlm.config import DataConfig, FieldFilter
from vlm.data import parquet_file, storage
from vlm.data.examples import WHERE
from vlm.data.pipeline import train_batches
from vlm.data.sources import CachedSource, open_source

THREADS = 8


def tars_beside_tables(folder):
    return DataConfig(kinds.tars_beside_tables(folder))


def filtered(folder):
    return DataConfig(kinds.tars(folder), filters=(FieldFilter("language", one_of=("en",)),))


def tfds(folder):
    from test_sources import TinyLabelled

    TinyLabelled(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return DataConfig(
        "tfds:tiny_labelled", "train", None, "picture", label="label", data_dir=str(folder)
    )


KINDS = {
    "tar": kinds.KINDS["tar, indexed"],
    "tar with tables": tars_beside_tables,
    "parquet of bytes": kinds.KINDS["parquet of bytes"],
    "parquet of paths": kinds.KINDS["parquet of paths"],
    "arrow": kinds.KINDS["arrow"],
    "array_record": kinds.KINDS["array_record"],
    "csv": kinds.KINDS["csv"],
    "jsonl": kinds.KINDS["jsonl"],
    "folder with texts": kinds.KINDS["folder with texts"],
    "class folders": kinds.KINDS["class folders"],
    "tfds": tfds,
    "filtered": filtered,
}


@pytest.fixture(params=KINDS)
def config(request, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return KINDS[request.param](tmp_path / "data")


def comparable(example):
    return {
        name: value.tobytes() if isinstance(value, Image.Image) else value
        for name, value in example.items()
        if name != WHERE
    }


def assert_threads_read(source, expected, turns=3):
    start = threading.Barrier(THREADS)

    def read(seed):
        start.wait()
        for index in np.random.default_rng(seed).permutation(turns * len(expected)).tolist():
            index %= len(expected)
            assert comparable(source[index]) == expected[index]

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(read, seed) for seed in range(THREADS)]:
            done.result()


def test_eight_threads_read_a_source_at_random(config):
    source = open_source(config, "train")
    expected = [comparable(source[i]) for i in range(len(source))]
    assert len(expected) > 5
    assert_threads_read(open_source(config, "train"), expected)
    assert_threads_read(pickle.loads(pickle.dumps(source)), expected)  # as a reader process has it
    cached = CachedSource(source, config, PREPROCESS)
    one = CachedSource(source, config, PREPROCESS)
    assert_threads_read(cached, [comparable(one[i]) for i in range(len(one))], turns=1)


@pytest.mark.parametrize("kind", ["mixture", "parquet of bytes"])
def test_batches_made_by_threads_are_those_of_one(kind, tmp_path):
    config = kinds.make(kind, tmp_path / "data")
    options = {"auto": {}, "random": {"interleave": None, "shuffle": DataConfig().shuffle}}

    def made(prefetch, access):
        iterator = train_batches(
            replace(config, prefetch=prefetch, access=access, **options[access]),
            PREPROCESS, TOKENIZER, batch_size=8, seed=3,
        )  # fmt: skip
        batches = [next(iterator) for _ in range(12)]
        iterator.close()
        return batches

    for access in ("auto",) if config.mixture else ("auto", "random"):
        for ours, plain in zip(made(8, access), made(0, access), strict=True):
            np.testing.assert_array_equal(ours["images"], plain["images"])
            np.testing.assert_array_equal(ours["tokens"], plain["tokens"])


def test_eight_threads_read_large_row_groups(tmp_path):
    """Two threads inside one open file crash Arrow: with one handle for all, 5 of 5 runs ended."""
    rng = np.random.default_rng(0)
    data = [rng.bytes(20_000) for _ in range(300)]
    rows = [{"image": {"bytes": one, "path": None}, "caption": "a"} for one in data]
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=6)
    source = open_source(DataConfig(path), "train")
    assert_threads_read(source, [{"image": one, "caption": "a"} for one in data], turns=1)


def test_parquet_holds_no_file_open(tmp_path, monkeypatch):
    """However many files there are, each is open only while it is read."""
    opened = []

    def open_file(path):
        opened.append(storage.open_file(path))
        return opened[-1]

    monkeypatch.setattr(parquet_file, "open_file", open_file)
    source = open_source(kinds.parquet_bytes(tmp_path), "train")
    for index in range(len(source)):
        source[index]
    assert len(opened) > kinds.SHARDS
    assert all(file.closed for file in opened)
