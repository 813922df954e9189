"""`hf://` sources, read from a Hub over loopback by huggingface_hub's own client.

The Parquet files are those of golden/, which the library `datasets` wrote. That its own
`push_to_hub` gives the same is in tests/peers/test_datasets_library.py.
"""

import dataclasses
import io
import itertools
import json
import sys
import tarfile
import time
from pathlib import Path

import kinds
import numpy as np
import pytest
from kinds import PREPROCESS, TOKENIZER, jpeg

from vlm.config import DataConfig
from vlm.data import hub_access, remote
from vlm.data.pipeline import train_batches
from vlm.data.sources import open_source, split_names, streams
from vlm.data.storage import read_file, read_range
from vlm.errors import DataError

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "weights"))

from hub_server import READER, TOKEN  # noqa: E402
from hub_server import connected as connected  # noqa: E402  # fixtures
from hub_server import hub as hub  # noqa: E402

GOLDEN = HERE / "golden"
ROWS = json.loads((GOLDEN / "rows.json").read_text())
PARQUET = DataConfig("", access="random", captions=("caption",))
TABLE = DataConfig("", image="file_name", captions=("text",))


@pytest.fixture(autouse=True)
def forget():
    hub_access._check.cache_clear()


def parquet(place: str) -> DataConfig:
    return dataclasses.replace(PARQUET, source=f"hf://datasets/{place}/data/{{split}}-*.parquet")


def captions(config: DataConfig, split: str = "train") -> list[str]:
    source = open_source(config, split)
    return [source[i][config.captions[0]] for i in range(len(source))]


def fails(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        open_source(config, "train")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(connected):
    """An imagefolder with a metadata.jsonl of its own in each split, as `datasets` reads it."""
    files = {}
    for split, first in (("train", 0), ("test", 4)):
        rows = []
        for i in range(first, first + 3):
            files[f"{split}/{i}.jpg"] = jpeg(i)
            rows.append(json.dumps({"file_name": f"{i}.jpg", "text": f"picture {i}"}))
        files[f"{split}/metadata.jsonl"] = "\n".join(rows).encode()
    connected.put("datasets/me/folder")
    connected.commit("datasets/me/folder", files, "main")
    return connected


# -------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("split", ["train", "test"])
def test_parquet(connected, split):
    connected.put("datasets/me/pets", GOLDEN)
    assert split_names(parquet("me/pets")) == ["test", "train"]
    assert captions(parquet("me/pets"), split) == [row["caption"] for row in ROWS[split]]


@pytest.mark.slow
def test_parquet_is_streamed(connected):
    connected.put("datasets/me/pets", GOLDEN)
    config = dataclasses.replace(
        parquet("me/pets"), access="auto", eval_split=None, captions=("captions",), interleave=1,
        max_bad_share=1.0, prefetch=0,
    )  # fmt: skip
    assert streams(config)
    local = dataclasses.replace(
        config, source=str(GOLDEN / "data" / "{split}-*.parquet"), access="stream"
    )
    batches = []
    for one in (config, local):
        iterator = train_batches(one, PREPROCESS, TOKENIZER, batch_size=2, seed=0)
        batches.append(np.stack([b["images"] for b in itertools.islice(iterator, 3)]))
        iterator.close()
    np.testing.assert_array_equal(*batches)


def test_a_revision(connected):
    old = connected.put("datasets/me/moving", GOLDEN).revisions["main"]
    name = "data/train-00000-of-00002.parquet"
    files = dict(connected.files("datasets/me/moving"))
    del files[name]
    connected.commit("datasets/me/moving", files, "main")
    connected.commit("datasets/me/moving", files, "refs/convert/parquet")
    every = [row["caption"] for row in ROWS["train"]]
    assert captions(parquet(f"me/moving@{old}")) == every
    assert captions(parquet("me/moving")) == every[-len(captions(parquet("me/moving"))) :] != every
    assert captions(parquet("me/moving@refs/convert/parquet")) == captions(parquet("me/moving"))
    assert fails(parquet("me/moving@v9")) == (
        "hf://datasets/me/moving@v9 has no such revision on the Hub: choose a branch, tag or "
        "commit after the @"
    )


def test_web_dataset(connected, tmp_path):
    local = kinds.tars(tmp_path)
    connected.put("datasets/me/shards", tmp_path)
    shards = "hf://datasets/me/shards/{000..005}.tar"
    config = DataConfig(shards, eval_split=None, interleave=3, prefetch=0)
    assert streams(config)
    batches = []
    for source, access in ((shards, "auto"), (local, "stream")):
        one = dataclasses.replace(config, source=source, access=access)
        iterator = train_batches(one, PREPROCESS, TOKENIZER, batch_size=6, seed=0)
        batches.append(np.stack([b["images"] for b in itertools.islice(iterator, 3)]))
        iterator.close()
    np.testing.assert_array_equal(*batches)
    random = open_source(dataclasses.replace(config, access="random", interleave=None), "train")
    assert (len(random), random[17]["caption"]) == (kinds.COUNT, "picture 17")


def test_a_folder_of_images_with_a_table(folder):
    config = dataclasses.replace(TABLE, source="hf://datasets/me/folder/{split}/metadata.jsonl")
    assert split_names(config) == ["test", "train"]
    assert captions(config, "train") == [f"picture {i}" for i in range(3)]
    assert captions(config, "test") == [f"picture {i}" for i in range(4, 7)]
    assert read_file(open_source(config, "test")[1]["file_name"]) == jpeg(5)
    one = "hf://datasets/me/folder/train/metadata.jsonl"
    iterator = train_batches(
        dataclasses.replace(config, source=one, eval_split=None, prefetch=0),
        PREPROCESS, TOKENIZER, batch_size=3, seed=0,
    )  # fmt: skip
    assert len(next(iterator)["images"]) == 3
    iterator.close()


def test_a_csv_with_a_column_of_splits(connected):
    rows = ["file_name,text,split", "0.jpg,one,train", "1.jpg,two,test"]
    connected.put("datasets/me/csv", metadata__csv="\n".join(rows).encode())
    config = dataclasses.replace(TABLE, source="hf://datasets/me/csv/metadata.csv")
    assert split_names(config) == ["test", "train"]
    assert captions(config, "test") == ["two"]


# ----------------------------------------------------------------------------- what is refused


def test_a_repository_without_files_that_are_read(connected):
    connected.put("datasets/me/classes")
    connected.commit("datasets/me/classes", {"cat/0.jpg": jpeg(0), "shard.bin": b"x"}, "main")
    message = fails(DataConfig("hf://datasets/me/classes"))
    assert "run `hf download --repo-type dataset me/classes --local-dir FOLDER`" in message


@pytest.mark.parametrize("form", ["data/train-*.parquet", "data/x.tar", "metadata.csv", ""])
def test_a_data_set_that_is_not_there(connected, form):
    assert fails(DataConfig(f"hf://datasets/me/absent/{form}")) == (
        "hf://datasets/me/absent is not on the Hub: check the name, or log in with `hf auth login` "
        "or HF_TOKEN if it is private"
    )


@pytest.mark.slow
def test_a_gated_and_a_private_data_set(connected, monkeypatch):
    connected.put("datasets/me/gated", GOLDEN).gated = True
    connected.put("datasets/me/private", GOLDEN).private = True
    assert fails(parquet("me/gated")) == (
        "hf://datasets/me/gated asks for your consent: accept its terms at "
        f"{connected.url}/datasets/me/gated, and log in with `hf auth login` or HF_TOKEN"
    )
    assert "is not on the Hub: check the name, or log in" in fails(parquet("me/private"))
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    assert "may not be read with this token (" in fails(parquet("me/private"))
    for token in (TOKEN, READER):
        monkeypatch.setenv("HF_TOKEN", token)
        for name in ("gated", "private"):
            assert len(captions(parquet(f"me/{name}"))) == len(ROWS["train"])


@pytest.mark.parametrize("source", ["hf://", "hf://datasets", "hf://datasets/pets/x.csv"])
def test_a_path_without_an_owner(connected, source):
    message = fails(DataConfig(source))
    assert source in message or "hf://datasets/pets/x.csv" in message
    assert "check the name" in message or "give hf://datasets/OWNER/NAME/FILES" in message


def test_files_that_are_not_there(connected):
    connected.put("datasets/me/pets", GOLDEN)
    for file in ("data/x-*.parquet", "data/x.parquet", "data/x-*.tar", "x.csv"):
        source = f"hf://datasets/me/pets/{file}"
        assert f"there is no table {source}" in (message := fails(DataConfig(source))) or (
            f"there are no shards {source}" in message
        )


def test_a_hub_that_is_out_of_reach(connected, monkeypatch):
    from huggingface_hub import HfFileSystem, constants

    connected.put("datasets/me/slow", GOLDEN).faults = {"": ["500"] * 9}
    assert "500" in (message := fails(parquet("me/slow")))
    assert message.endswith("try again later")
    connected.repositories["datasets/me/slow"].faults = {}
    assert len(captions(parquet("me/slow"))) == len(ROWS["train"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    HfFileSystem.clear_instance_cache()
    hub_access._check.cache_clear()
    assert "as the Hub is out of reach (" in fails(parquet("me/slow"))


@pytest.mark.slow
def test_a_cut_download_is_retried(folder):
    repository = folder.put("datasets/me/pets", GOLDEN)
    repository.faults = {"data/train-00000-of-00002.parquet": ["cut", "drop"]}
    assert captions(parquet("me/pets")) == [row["caption"] for row in ROWS["train"]]
    assert repository.faults == {"data/train-00000-of-00002.parquet": []}
    repository = folder.repositories["datasets/me/folder"]
    repository.faults = {"train/1.jpg": ["cut", "500"]}
    assert read_file("hf://datasets/me/folder/train/1.jpg") == jpeg(1)
    assert repository.faults == {"train/1.jpg": []}


def test_a_read_that_hangs_has_a_deadline(connected, monkeypatch):
    pytest.importorskip("aiohttp")
    repository = connected.put("datasets/me/pets", GOLDEN)
    name = "data/train-00000-of-00002.parquet"
    repository.faults = {name: ["stall"]}
    monkeypatch.setattr(remote, "STALL", 0.3)
    start = time.monotonic()
    data = read_range(f"hf://datasets/me/pets/{name}", 4, 60)
    assert data == (GOLDEN / name).read_bytes()[4:60]
    assert time.monotonic() - start < 10
    assert repository.faults == {name: []}


def test_the_token_stays_with_the_hub(connected, monkeypatch):
    """Large files come from another host, which is not sent the token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    connected.put("datasets/me/secret", GOLDEN).private = True
    path = "hf://datasets/me/secret/data/train-00000-of-00002.parquet"
    connected.tokens.clear()
    assert read_range(path, 0, 4) == b"PAR1"
    sent = {(host, token is not None) for host, token in connected.tokens}
    assert ("localhost", False) in sent
    assert ("localhost", True) not in sent


@pytest.mark.slow
def test_a_cut_shard_is_read_on(connected):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(40):
            for name, data in ((f"{i}.jpg", jpeg(i % 6)), (f"{i}.txt", b"picture %d" % i)):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    repository = connected.put("datasets/me/one", train__tar=out.getvalue())
    repository.faults = {"train.tar": ["cut", "drop"]}
    config = DataConfig("hf://datasets/me/one/{split}.tar", access="random")
    assert captions(config) == [f"picture {i}" for i in range(40)]
    assert repository.faults == {"train.tar": []}
