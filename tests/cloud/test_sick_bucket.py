"""Training data in a bucket that hangs, resets, truncates or is busy: the same data, no stall."""

import io
import logging
import tarfile
import time

import numpy as np
import pytest
from bucket import Bucket
from PIL import Image

from vlm.config import DataConfig
from vlm.data import remote
from vlm.data.sources import open_source
from vlm.data.storage import read_range

pytestmark = pytest.mark.slow

EACH = 4


def shard(number: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for n in range(EACH * number, EACH * (number + 1)):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), (n, 0, 0)).save(image, "PNG")
            for name, data in ((f"{n}.png", image.getvalue()), (f"{n}.txt", f"text {n}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "REQUESTS", remote.Requests())
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    with Bucket(tmp_path / "bucket", delay=0.01) as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.mark.parametrize("kind", ["503", "reset", "hang", "cut"])
def test_shards_are_read_whole_and_in_time(bucket, kind, caplog):
    for n in range(3):
        bucket.write(f"{kind}/{n}.tar", shard(n))
    config = DataConfig(f"gs://bucket/{kind}/{{0..2}}.tar", eval_split=None, access="random")
    source = open_source(config, "train")
    data = shard(1)
    for _ in range(30):
        assert read_range(f"gs://bucket/{kind}/1.tar", 0, 1000) == data[:1000]
    with caplog.at_level(logging.WARNING, "vlm"):
        for n in range(0, len(source), 3):
            bucket.fail(kind, f"{kind}%2F{n // EACH}.tar")
            start = time.monotonic()
            assert source[n]["caption"] == f"text {n}"
            assert time.monotonic() - start < 15
    assert not bucket.faults  # they were met
    assert np.all([source[n]["caption"] == f"text {n}" for n in range(len(source))])
    # gcsfs repeats failed requests by itself, so those are only logged if they are slow.
    assert kind != "hang" or any("remote storage: " in message for message in caplog.messages)
