"""The files of each split that vlm finds in a repository are those that `datasets` finds."""

import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

datasets = pytest.importorskip("datasets")

from vlm.data.layouts import find_layout  # noqa: E402

pytestmark = pytest.mark.peers

CONFIGS = """
configs:
- config_name: photos
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
OF_CONFIGS = (
    "photos/train-0.parquet", "photos/train-1.parquet", "photos/rest/a.parquet",
    "photos/rest/b.parquet", "drawings/x/y.parquet", "drawings/z.parquet",
    "beside/test/0.parquet", "beside/train/0.parquet",
)  # fmt: skip
SHARDS = [f"data/{split}-0000{n}-of-00002.parquet" for split in ("train", "my_own") for n in (0, 1)]
REPOSITORIES = {
    "push_to_hub": (SHARDS, "", None),
    "folders": (["training/x.parquet", "dev/y.parquet", "test/a/z.parquet"], "", None),
    "names": (["my_train.parquet", "my-val-1.parquet", "eval.parquet"], "", None),
    "names in folders": (["a/x_train_0.parquet", "b/test.parquet"], "", None),
    "no splits": (["a.parquet", "b/latest.parquet", "c/contest.parquet"], "", None),
    "one config": (
        ["x/a.parquet", "x/b/c.parquet"],
        "configs:\n- config_name: one\n  data_files: x/*",
        None,
    ),
    "a default": (
        ["x.parquet", "y.parquet"],
        "configs:\n- config_name: a\n  data_files: x.parquet\n"
        "- config_name: b\n  default: true\n  data_files: '*y*'",
        None,
    ),
    "named default": (
        ["x.parquet", "y.parquet"],
        "configs:\n- config_name: a\n  data_files: x.parquet\n"
        "- config_name: default\n  data_files: [y.parquet]",
        None,
    ),
    **{name: (list(OF_CONFIGS), CONFIGS, name) for name in ("photos", "drawings.v2", "beside")},
}  # fmt: skip


@pytest.mark.parametrize("name", REPOSITORIES)
def test_files_by_split(tmp_path, name, monkeypatch):
    files, readme, config = REPOSITORIES[name]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"caption": ["a cat"]}), root / file)
    if readme:
        (root / "README.md").write_text(f"---\n{readme}\n---\n")
    builder = datasets.load_dataset_builder(str(root), config)
    theirs = {
        str(split): sorted(os.path.relpath(file, root) for file in found)
        for split, found in builder.config.data_files.items()
    }
    ours = find_layout_of(root, config)
    assert ours == theirs


def find_layout_of(root: Path, config: str | None) -> dict[str, list[str]]:
    from vlm.data import layouts

    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()]
    found = layouts._splits(names, config or "", str(root), f"{root}/")
    assert found is not None
    if config is None:
        layout = find_layout(str(root))
        assert layout is None or set(layout.splits) == set(found)
    return {split or "train": sorted(files) for split, files in found.items()}
