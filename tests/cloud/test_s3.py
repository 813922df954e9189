"""Training data in an S3 bucket: moto's server, read by s3fs.

The packages are not those of the extra `test`: pip install "vlm-jax[s3]" "moto[server]".
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

sys.path.append(str(Path(__file__).parents[1] / "data"))

import kinds
from kinds import PREPROCESS, TOKENIZER

from vlm.config import DataConfig
from vlm.data import remote, storage
from vlm.data.pipeline import train_batches
from vlm.data.sources import open_source, split_names
from vlm.data.storage import exists, read_file, read_range, write_whole
from vlm.errors import DataError
from vlm.weights.files import SafetensorsFile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """An empty bucket, in the environment of this process."""
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", server),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("VLM_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "REQUESTS", remote.Requests())
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    name = f"bucket-{abs(hash(str(tmp_path)))}"
    system.mkdir(name)
    yield f"s3://{name}"
    system.rm(name, recursive=True)


def upload(bucket: str, folder: Path) -> None:
    for path in folder.iterdir():
        write_whole(f"{bucket}/{path.name}", path.read_bytes())


def batches(config: DataConfig) -> list[np.ndarray]:
    iterator = train_batches(config, PREPROCESS, TOKENIZER, batch_size=6, seed=0)
    found = [batch["images"] for batch in itertools.islice(iterator, 8)]
    iterator.close()
    return found


def test_reads(bucket):
    data = np.random.default_rng(0).bytes(100_000)
    write_whole(f"{bucket}/a/b.bin", data[:10], data[10:])
    assert read_file(f"{bucket}/a/b.bin") == data
    assert read_range(f"{bucket}/a/b.bin", 500, 700) == data[500:700]
    assert (exists(f"{bucket}/a/b.bin"), exists(f"{bucket}/a/c.bin")) == (True, False)
    assert storage.expand(f"{bucket}/a/*.bin") == [f"{bucket}/a/b.bin"]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_stream_is_that_of_local_files(bucket, tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    local = DataConfig(kinds.tars(folder)) if kind == "tar" else kinds.parquet_bytes(folder)
    upload(bucket, folder)
    local = dataclasses.replace(
        local, eval_split=None, access="stream", interleave=3, shuffle=20, prefetch=0
    )
    source = local.source.replace(str(folder), bucket)
    for ours, theirs in zip(
        batches(dataclasses.replace(local, source=source)), batches(local), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_random_access_and_tables(bucket, tmp_path):
    kinds.tars(tmp_path)
    kinds.csv(tmp_path)
    upload(bucket, tmp_path)
    for source in (f"{bucket}/{{000..005}}.tar", f"{bucket}/captions.csv"):
        config = DataConfig(source, eval_split=None, access="random")
        opened = open_source(config, "train")
        assert len(opened) == kinds.COUNT
        assert {opened[i]["caption"] for i in range(kinds.COUNT)} == {
            f"picture {i}" for i in range(kinds.COUNT)
        }
    write_whole(f"{bucket}/train-0.tar", (tmp_path / "000.tar").read_bytes())
    write_whole(f"{bucket}/val-0.tar", (tmp_path / "001.tar").read_bytes())
    assert split_names(DataConfig(f"{bucket}/{{split}}-*.tar")) == ["train", "val"]


def test_weights(bucket):
    import safetensors.numpy

    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_whole(f"{bucket}/model.safetensors", safetensors.numpy.save({"a": tensor}))
    np.testing.assert_array_equal(SafetensorsFile(f"{bucket}/model.safetensors").read("a"), tensor)


def test_what_is_not_there(bucket, monkeypatch):
    with pytest.raises(DataError, match=r"there are no shards s3://.*/\*.tar: check data.source"):
        open_source(DataConfig(f"{bucket}/*.tar"), "train")
    with pytest.raises(DataError, match="s3://no-such-bucket"):
        open_source(DataConfig("s3://no-such-bucket/a.csv"), "train")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="cannot be looked up"):
        exists(f"{bucket}/a.tar")
