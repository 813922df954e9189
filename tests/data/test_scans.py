"""Passes without images find what the examples have, once for all processes and runs."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import kinds
import pytest

from vlm.config import DataConfig, FieldFilter
from vlm.data import scans
from vlm.data.examples import scan
from vlm.data.faults import BadSample
from vlm.data.sources import classes_of, first_captions, open_source

SOURCES = ["tar, indexed", "tar with tables, streamed", "parquet of bytes", "arrow", "csv"]
ENGLISH = (FieldFilter("language", one_of=("en",)),)


def opened(kind, folder, **fields):
    config = kinds.make(kind, folder)
    config = dataclasses.replace(config, access="random", interleave=None, shuffle=None, **fields)
    return open_source(config, "train")


def caption_of(example):
    return example["caption"] if isinstance(example, dict) else None


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_scan_has_the_texts_of_the_examples_in_order(tmp_path, kind):
    source = opened(kind, tmp_path / "data", filters=())
    expected = [caption_of(source[i]) for i in range(len(source))]
    assert [caption_of(example) for example in scan(source)] == expected
    assert expected[7] == "picture 7"


def test_no_image_is_read(tmp_path, monkeypatch):
    source = opened("parquet of bytes", tmp_path / "parquet")
    assert all("image" not in example for example in scan(source))
    table = opened("arrow", tmp_path / "arrow")
    assert all("image" not in example for example in scan(table))
    shards = opened("tar, indexed", tmp_path / "tar")
    assert all(example["image"] is None for example in scan(shards))


def test_a_broken_row_group_or_shard_is_bad_in_a_scan_too(tmp_path, monkeypatch):
    source = opened("parquet of bytes", tmp_path / "parquet")
    os.remove(source.files[1])
    bad = [i for i, example in enumerate(scan(source)) if isinstance(example, BadSample)]
    assert bad == list(range(8, 16))
    shards = opened("tar, indexed", tmp_path / "tar")
    os.truncate(shards.files[2], 1024)
    bad = [i for i, example in enumerate(scan(shards)) if isinstance(example, BadSample)]
    assert bad == list(range(16, 24))


def test_filters_are_evaluated_once_until_a_file_changes(tmp_path, monkeypatch):
    passes = []
    count_passes(monkeypatch, passes)
    (tmp_path / "data").mkdir()
    config = DataConfig(kinds.tars(tmp_path / "data"), eval_split=None, filters=ENGLISH)
    with ThreadPoolExecutor(4) as pool:  # processes wait for each other in the same way
        sources = list(pool.map(lambda _: open_source(config, "train"), range(4)))
    assert len(passes) == 1
    captions = [f"picture {i}" for i in range(kinds.COUNT) if i % 2]
    assert [first_captions(source, config) for source in sources] == [captions] * 4
    other = dataclasses.replace(config, filters=(FieldFilter("score", at_least=4),))
    assert first_captions(open_source(other, "train"), other)[0] == "picture 40"
    kinds.write_tar(tmp_path / "data/000.tar", kinds.members(101))
    assert first_captions(open_source(config, "train"), config)[0] == "picture 101"


def count_passes(monkeypatch, passes):
    def counted(source):
        passes.append(source)
        return scan(source)

    monkeypatch.setattr(scans, "scan", counted)


def test_labels_are_collected_once(tmp_path, monkeypatch):
    kinds.parquet_bytes(tmp_path)
    config = DataConfig(
        str(tmp_path / "*.parquet"), eval_split=None, label="caption", access="random"
    )
    expected = sorted(f"picture {i}" for i in range(kinds.COUNT))
    assert classes_of(config).labels == expected
    monkeypatch.setattr(scans, "scan", None)
    assert classes_of(config).labels == expected


def test_a_damaged_cache_is_written_again(tmp_path):
    (tmp_path / "data").mkdir()
    config = DataConfig(kinds.tars(tmp_path / "data"), eval_split=None, filters=ENGLISH)
    expected = len(open_source(config, "train"))
    (kept,) = (tmp_path / "cache").rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:50])
    assert len(open_source(config, "train")) == expected
