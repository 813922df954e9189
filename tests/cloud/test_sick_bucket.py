"""Training data in a bucket that hangs, resets, truncates or is busy: the same data, no stall."""

import io
import logging
import tarfile
import time

import numpy as np
import pytest
import safetensors.numpy
from bucket import Bucket
from PIL import Image

from vlm import paths
from vlm.config import DataConfig
from vlm.data import remote
from vlm.data.sources import open_source
from vlm.data.storage import read_range
from vlm.paths import as_path
from vlm.weights.files import SafetensorsFile

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


@pytest.mark.parametrize("kind", ["503", "reset", "hang", "cut"])
def test_weights_of_a_bundle_are_read_whole_and_in_time(bucket, kind):
    tensors = {f"layer{n}.kernel": np.full((3, n + 1), n, np.float32) for n in range(6)}
    bucket.write(f"{kind}/model.safetensors", safetensors.numpy.save(tensors))
    file = SafetensorsFile(f"gs://bucket/{kind}/model.safetensors")
    requests = bucket.requests
    for name, tensor in tensors.items():
        bucket.fail(kind, "model.safetensors")
        start = time.monotonic()
        np.testing.assert_array_equal(file.read(name), tensor)
        assert time.monotonic() - start < 15
    assert not bucket.faults
    assert bucket.requests - requests <= 4 * len(tensors)  # the file is not looked up again


def test_a_bucket_path_has_a_deadline(bucket):
    """Also requests of other libraries' kinds: gcsfs itself would wait without end."""
    import gcsfs

    as_path("gs://bucket/model")
    assert gcsfs.GCSFileSystem().requests_timeout.sock_read == paths.STALL
    system, _ = remote._system("gs://bucket/model", of_web=False)
    assert system.requests_timeout.sock_read == remote.STALL


def test_new_files_of_other_processes_are_listed(bucket):
    """A supervisor or `vlm runs --serve` waits for files that others write."""
    folder = as_path("gs://bucket/checkpoints")
    bucket.write("checkpoints/100/state", b"1")
    assert [path.name for path in folder.iterdir()] == ["100"]
    bucket.write("checkpoints/200/state", b"2")
    time.sleep(paths.LISTING_AGE)
    assert sorted(path.name for path in folder.iterdir()) == ["100", "200"]
