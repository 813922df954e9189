"""Remote shards, by way of fsspec: streamed by default, and the same as local ones."""

import dataclasses
import itertools
import re
from pathlib import Path

import fsspec
import kinds
import numpy as np
import pytest
from kinds import PREPROCESS, TOKENIZER

from vlm.config import DataConfig
from vlm.data.pipeline import count_examples, train_batches
from vlm.data.sources import open_source, streams, vocabulary_texts
from vlm.data.storage import SequentialFile, expand, open_file
from vlm.errors import ConfigError, DataError


@pytest.fixture
def local(tmp_path):
    config = DataConfig(kinds.tars(tmp_path), eval_split=None, interleave=3, prefetch=0, shuffle=9)
    system = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield config
    system.rm("/bucket", recursive=True)


def first(config: DataConfig, count: int = 6) -> np.ndarray:
    iterator = train_batches(config, PREPROCESS, TOKENIZER, batch_size=6, seed=0)
    images = np.stack([batch["images"] for batch in itertools.islice(iterator, count)])
    iterator.close()
    return images


@pytest.mark.parametrize("pattern", ["memory://bucket/{000..005}.tar", "memory://bucket/*.tar"])
def test_a_bucket_is_streamed_and_gives_what_the_disk_gives(local, pattern):
    remote = dataclasses.replace(local, source=pattern)
    assert streams(remote)
    assert not streams(local)
    expected = first(dataclasses.replace(local, access="stream"))
    np.testing.assert_array_equal(first(remote), expected)
    with pytest.raises(ConfigError, match="read as a stream, whose number of examples"):
        count_examples(remote)
    with pytest.raises(ConfigError, match="epochs are undefined"):
        train_batches(remote, PREPROCESS, TOKENIZER, batch_size=6, seed=0, epochs=1)
    with pytest.raises(ConfigError, match="set tokenizer_file"):
        vocabulary_texts(remote)


def test_a_bucket_has_random_access_where_it_is_asked_for(local):
    local = dataclasses.replace(local, interleave=None, shuffle=DataConfig.shuffle)
    remote = dataclasses.replace(local, source="memory://bucket/*.tar", access="random")
    a, b = open_source(remote, "train"), open_source(local, "train")
    assert len(a) == len(b) == kinds.COUNT
    assert a[17]["caption"] == b[17]["caption"] == "picture 17"
    np.testing.assert_array_equal(first(remote), first(dataclasses.replace(local, access="random")))


def test_what_a_bucket_lacks(local):
    for pattern, message in [
        ("memory://bucket/none-*.tar", "there are no shards memory://bucket/none"),
        ("memory://bucket/{100..110}.tar", r"none of the first 8 shards of .*there is no memory"),
    ]:
        with pytest.raises(DataError, match=message):
            first(dataclasses.replace(local, source=pattern))
    with pytest.raises(DataError, match="no driver for nowhere://x"):
        expand("nowhere://x/*.tar")
    with pytest.raises(ConfigError, match="cannot be read as a stream"):
        first(dataclasses.replace(local, source="openmoji", access="stream"))


def test_reading_front_to_back_skips_and_goes_on(tmp_path):
    data = bytes(range(256)) * 40
    path = tmp_path / "file"
    path.write_bytes(data)
    for chunk in (7, 100, 100_000):
        file = SequentialFile(str(path), 10, chunk)
        assert file.read(5) == data[10:15]
        file.skip(300)
        assert file.offset == 315
        assert file.read(90) == data[315:405]
        assert file.read(10**6) == data[405:]
        assert file.read(1) == b""
        file.close()
    assert Path(path).stat().st_size == len(data)


@pytest.mark.parametrize(
    ("path", "package"),
    [
        ("gs://b/x", "vlm-jax[gcs]"),
        ("gcs://b/x", "vlm-jax[gcs]"),
        ("s3://b/x", "vlm-jax[s3]"),
        ("https://b/x", "aiohttp"),
    ],
)
def test_a_driver_that_is_missing_is_named_with_its_package(monkeypatch, path, package):
    def missing(path, **options):
        raise ImportError("no such driver")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=re.escape(f"run pip install {package!r}")):
        open_file(path)
