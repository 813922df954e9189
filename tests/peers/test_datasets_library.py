"""Data sets that the library `datasets` writes, read by it and by vlm: equal pair by pair."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

sys.path.append(str(Path(__file__).parents[1] / "data" / "golden"))
sys.path.append(str(Path(__file__).parents[1] / "weights"))

from hub_server import TOKEN  # noqa: E402
from hub_server import connected as connected  # noqa: E402  # fixtures
from hub_server import hub as hub  # noqa: E402


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("datasets")
    from huggingface import write

    folder = tmp_path_factory.mktemp("huggingface")
    (folder / "images").mkdir()
    return folder, write(folder, folder / "images")


@pytest.mark.parametrize(
    "pattern", ["data/{split}-*.parquet", "saved", "saved/{split}/data-*.arrow"]
)
def test_every_pair_is_equal(written, pattern, monkeypatch):
    import datasets
    from huggingface import COUNT, plain, plain_example

    from vlm.config import DataConfig
    from vlm.data.sources import open_source

    folder, made = written
    names = (
        "label", "labels", "caption", "captions", "long", "sentences/raw", "info/text/en",
        "info/text/de", "translation/en", "translation/fr",
    )  # fmt: skip
    config = DataConfig(str(folder / pattern), captions=names, access="random")
    read = made
    if pattern == "saved":
        read = datasets.load_from_disk(folder / "saved")
    elif pattern.startswith("data"):
        monkeypatch.setenv("HF_HOME", str(folder / "cache"))
        files = {split: str(folder / f"data/{split}-*.parquet") for split in made}
        read = datasets.load_dataset("parquet", data_files=files, cache_dir=folder / "cache")
    for split in ("train", "test"):
        source = open_source(config, split)
        assert len(source) == len(read[split]) == COUNT
        for index in range(COUNT):
            expected = plain(read[split], index)
            example = {"info/score": expected["info/score"], **source[index]}
            assert plain_example(example) == expected


def test_a_data_set_that_it_pushes_to_the_hub(connected, monkeypatch):
    pytest.importorskip("datasets")
    import datasets
    from huggingface import COUNT, features, plain, plain_example, rows

    from vlm.config import DataConfig
    from vlm.data.sources import open_source

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", connected.url)
    made = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(rows(first, None), features())
            for split, first in (("train", 0), ("test", COUNT))
        }
    )
    made.push_to_hub("me/pushed", num_shards={"train": 2, "test": 1})
    names = ("label", "labels", "caption", "captions", "sentences/raw", "translation/fr")
    source = "hf://datasets/me/pushed/data/{split}-*.parquet"
    config = DataConfig(source, captions=names, access="random")
    for split in ("train", "test"):
        read = open_source(config, split)
        assert len(read) == COUNT
        for index in range(COUNT):
            expected = plain(made[split], index)
            example = plain_example({**expected, **read[index]})
            assert example == expected
