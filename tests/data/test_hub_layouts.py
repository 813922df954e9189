"""`hf://datasets/OWNER/NAME` without files: configs of README.md, names of files, Parquet copies.

Which files `datasets` itself chooses for these repositories is in
tests/peers/test_repository_layouts.py.
"""

import dataclasses
import io
import itertools
import json
import logging
import sys
from pathlib import Path

import kinds
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from kinds import PREPROCESS, TOKENIZER, jpeg

from vlm.config import DataConfig
from vlm.data import hub_access, layouts
from vlm.data.pipeline import train_batches
from vlm.data.sources import kind_of, open_source, split_names, streams
from vlm.errors import DataError

sys.path.append(str(Path(__file__).parent.parent / "weights"))

from hub_server import connected as connected  # fixtures
from hub_server import hub as hub


@pytest.fixture(autouse=True)
def forget():
    hub_access._check.cache_clear()
    layouts._on_hub.cache_clear()


def parquet(*numbers: int) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(kinds.table_with_bytes(list(numbers)), out)
    return out.getvalue()


def put(hub, files: dict[str, bytes], revision: str = "main", readme: str = "") -> str:
    if readme:
        files = {**files, "README.md": f"---\n{readme}\n---\n# A data set\n".encode()}
    hub.put("datasets/me/set")
    hub.commit("datasets/me/set", {".gitattributes": b"", **files}, revision)
    hub_access._system().invalidate_cache()
    layouts._on_hub.cache_clear()
    return "hf://datasets/me/set"


def captions(source: str, split: str = "train", **fields) -> list[str]:
    config = DataConfig(source, access="random", **fields)
    opened = open_source(config, split)
    return [opened[i][config.captions[0]] for i in range(len(opened))]


def pictures(*numbers: int) -> list[str]:
    return [f"picture {n}" for n in numbers]


def fails(source: str, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        captions(source, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


SHARDED = {
    "data/train-00000-of-00002.parquet": parquet(0, 1),
    "data/train-00001-of-00002.parquet": parquet(2),
    "data/test-00000-of-00001.parquet": parquet(3),
}
CONFIGS = """
configs:
- config_name: photos
  default: true
  data_files:
  - split: train
    path: photos/train-*
  - split: held_out
    path: [photos/rest/a.parquet, photos/rest/b.parquet]
- config_name: drawings.v2
  data_files: drawings/**
- config_name: beside
  data_dir: beside
"""
OF_CONFIGS = {
    "photos/train-0.parquet": parquet(0),
    "photos/train-1.parquet": parquet(1),
    "photos/rest/a.parquet": parquet(2),
    "photos/rest/b.parquet": parquet(3),
    "drawings/x/y.parquet": parquet(4),
    "drawings/z.parquet": parquet(5),
    "beside/test/0.parquet": parquet(6),
    "beside/train/0.parquet": parquet(7),
}


def test_names_of_push_to_hub(connected):
    source = put(connected, SHARDED)
    assert kind_of(source) == "parquet"
    assert split_names(DataConfig(source)) == ["test", "train"]
    assert captions(source) == pictures(0, 1, 2)
    assert captions(source, "test") == pictures(3)
    assert fails(source, "validation") == f"{source} has no split 'validation': it has test, train"
    assert captions(f"{source}/data/{{split}}-*.parquet") == pictures(0, 1, 2)  # as before


def test_configs_of_the_readme(connected):
    source = put(connected, OF_CONFIGS, readme=CONFIGS)
    assert split_names(DataConfig(source)) == ["train", "held_out"]
    assert captions(source) == pictures(0, 1)
    assert captions(source, "held_out") == pictures(2, 3)
    assert captions(f"{source}/photos") == pictures(0, 1)
    assert captions(f"{source}/drawings.v2") == pictures(4, 5)
    assert captions(f"{source}/beside") == pictures(7)
    assert captions(f"{source}/beside/", "test") == pictures(6)
    assert captions(f"{source}/photos/rest") == pictures(2, 3)  # a folder
    assert fails(f"{source}/sketches") == (
        f"{source}/sketches has no files in 'sketches', and the configs photos, drawings.v2, "
        "beside: name one"
    )


def test_several_configs_without_a_default(connected):
    readme = CONFIGS.replace("  default: true\n", "")
    source = put(connected, OF_CONFIGS, readme=readme)
    assert fails(source) == (
        f"{source} has the configs photos, drawings.v2, beside: name one of them, as in "
        f"{source}/photos"
    )


@pytest.mark.parametrize(
    ("readme", "why"),
    [
        ("configs: [", "has YAML that cannot be read ("),
        ("configs:\n- config_name: a\n  data_files: gone/*.parquet", "that are not there"),
        ("configs:\n- config_name: a\n  data_files: [{split: train, path: 3}]", "data_files 3"),
    ],
)
def test_a_readme_that_does_not_fit(connected, readme, why):
    assert why in fails(put(connected, SHARDED, readme=readme))


@pytest.mark.parametrize("readme", ["configs: 3", "configs: [3, {}]", "license: mit", "[]"])
def test_a_readme_without_configs(connected, readme):
    assert captions(put(connected, SHARDED, readme=readme)) == pictures(0, 1, 2)


def test_splits_by_folder_by_file_name_and_without(connected):
    source = put(connected, {"training/x.parquet": parquet(0), "dev/y.parquet": parquet(1)})
    assert (captions(source), captions(source, "dev")) == (pictures(0), pictures(1))
    source = put(connected, {"my_train.parquet": parquet(2), "my-val-1.parquet": parquet(3)})
    assert (captions(source), captions(source, "val")) == (pictures(2), pictures(3))
    source = put(connected, {"a.parquet": parquet(4), "b/latest.parquet": parquet(5)})
    assert split_names(DataConfig(source)) is None
    assert captions(source) == pictures(4, 5)
    assert "has no {split} in it, so there is no split 'test'" in fails(source, "test")


def test_web_dataset_tars(connected, tmp_path):
    kinds.tars(tmp_path)
    shards = {f"shards/{path.name}": path.read_bytes() for path in tmp_path.glob("*.tar")}
    source = put(connected, shards)
    config = DataConfig(source, eval_split=None, interleave=3, prefetch=0)
    assert (kind_of(source), streams(config)) == ("tar", True)
    batches = []
    for one in (config, dataclasses.replace(config, source=f"{source}/shards/*.tar")):
        iterator = train_batches(one, PREPROCESS, TOKENIZER, batch_size=6, seed=0)
        batches.append(np.stack([b["images"] for b in itertools.islice(iterator, 3)]))
        iterator.close()
    np.testing.assert_array_equal(*batches)
    assert captions(source)[:3] == pictures(0, 1, 2)


@pytest.mark.parametrize("splits", [(), ("train", "test")])
def test_an_image_folder_with_a_table(connected, splits):
    files = {}
    for number, split in enumerate(splits or ("",)):
        above = f"{split}/" if split else ""
        files[f"{above}{number}.jpg"] = jpeg(number)
        row = {"file_name": f"{number}.jpg", "text": f"picture {number}"}
        files[f"{above}metadata.jsonl"] = json.dumps(row).encode()
    source = put(connected, files)
    table = {"image": "file_name", "captions": ("text",)}
    assert kind_of(source) == "table"
    assert captions(source, **table) == pictures(0)
    if splits:
        assert captions(source, "test", **table) == pictures(1)


def test_the_parquet_copy_of_other_files(connected, caplog):
    files = {"train/cat/0.jpg": jpeg(0), "train/dog/1.jpg": jpeg(1)}
    source = put(connected, files)
    copy = {"default/train/0000.parquet": parquet(0), "default/test/0000.parquet": parquet(1)}
    assert "has no Parquet files, no tars and no metadata.csv" in fails(source)
    put(connected, copy, "refs/convert/parquet")
    with caplog.at_level(logging.WARNING, "vlm"):
        assert (captions(source), captions(source, "test")) == (pictures(0), pictures(1))
    assert f"{source} has no files that vlm reads: its copy at @refs/convert/parquet" in caplog.text
    assert "run `hf download --repo-type dataset me/set" in fails(f"{source}@main")  # was named
    zipped = "configs:\n- config_name: default\n  data_files: train/**"
    put(connected, files, readme=zipped)
    assert captions(source) == pictures(0)
    put(connected, {**copy, "big/train/0000.parquet": parquet(2)}, "refs/convert/parquet")
    assert captions(f"{source}/big") == pictures(2)
    put(connected, {"default/partial-train/0.parquet": parquet(3)}, "refs/convert/parquet")
    assert "the Hub's Parquet copy has only a part of it" in fails(source)


def test_files_of_several_kinds(connected, tmp_path):
    kinds.tars(tmp_path)
    files = {"a.parquet": parquet(0), "b.tar": (tmp_path / "000.tar").read_bytes()}
    assert "has files of several kinds, such as " in fails(put(connected, files))


def test_a_data_set_stays_at_its_commit(connected):
    source = put(connected, SHARDED)
    opened = open_source(DataConfig(source, access="random"), "train")
    put(connected, {name: parquet(9) for name in SHARDED})
    assert [opened[i]["caption"] for i in range(3)] == pictures(0, 1, 2)
    assert captions(source) == pictures(9, 9)


def test_a_local_folder_of_shards(tmp_path):
    (tmp_path / "data").mkdir()
    for name, data in SHARDED.items():
        (tmp_path / name).write_bytes(data)
    source = str(tmp_path)
    assert (captions(source), captions(source, "test")) == (pictures(0, 1, 2), pictures(3))
    (tmp_path / "README.md").write_text(
        "---\nconfigs: [{config_name: a, data_files: data/te*}]\n---"
    )
    assert captions(source) == pictures(3)
    (tmp_path / "photo.jpg").write_bytes(jpeg(0))
    assert kind_of(source) == "folder"


def test_a_local_folder_of_img2dataset(tmp_path):
    kinds.tars_beside_tables(tmp_path)
    assert kind_of(f"{tmp_path}/") == "tar"
    assert captions(f"{tmp_path}/", "train") == pictures(*range(kinds.COUNT))


def test_a_stream_without_the_image_names_it(connected):
    source = put(connected, SHARDED)
    config = DataConfig(source, image="img", eval_split=None)
    with pytest.raises(DataError) as caught:
        train_batches(config, PREPROCESS, TOKENIZER, batch_size=2, seed=0)
    assert str(caught.value).endswith(
        "has no feature 'img' that data.image names: it has caption, image/bytes, image/path, "
        "score: set data.image to 'image'"
    )


def test_a_gated_data_set_by_name(connected):
    connected.put("datasets/me/gated2").gated = True
    connected.commit("datasets/me/gated2", SHARDED, "main")
    assert fails("hf://datasets/me/gated2") == (
        "hf://datasets/me/gated2 asks for your consent: accept its terms at "
        f"{connected.url}/datasets/me/gated2, and log in with `hf auth login` or HF_TOKEN"
    )
    assert "is not on the Hub: check the name" in fails("hf://datasets/me/nothing")
    assert "has no such revision on the Hub" in fails(f"{put(connected, SHARDED)}@v9")


def test_many_configs_are_not_all_listed(connected):
    files = {f"c{n}/a.parquet": parquet(n) for n in range(20)}
    readme = "configs:\n" + "".join(
        f"- config_name: c{n}\n  data_files: c{n}/*\n" for n in range(20)
    )
    message = fails(put(connected, files, readme=readme))
    assert "c10, c11 and 8 more: name one of them, as in hf://datasets/me/set/c0" in message


def test_a_stream_resumes_exactly(connected):
    files = {
        f"data/train-0000{n}-of-00003.parquet": parquet(*range(9 * n, 9 * n + 9)) for n in range(3)
    }
    config = DataConfig(put(connected, files), eval_split=None, interleave=3, prefetch=0)
    whole = train_batches(config, PREPROCESS, TOKENIZER, batch_size=3, seed=0)
    seen, states = [], []
    for _ in range(18):
        states.append(json.loads(json.dumps(whole.get_state())))
        seen.append(kinds.numbers_of(next(whole)))
    whole.close()
    for epoch in (seen[:9], seen[9:]):
        assert sorted(itertools.chain(*epoch)) == list(range(27))
    layouts._on_hub.cache_clear()
    again = train_batches(config, PREPROCESS, TOKENIZER, batch_size=3, seed=0)
    again.set_state(states[5])
    assert [kinds.numbers_of(next(again)) for _ in range(8)] == seen[5:13]
    again.close()
