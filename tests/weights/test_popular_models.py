"""Thirty image-text models that listings name most, by the layout that they have on the Hub.

No dated ranking of downloads could be read, so this is no ranking. The models are those that the
documentation of transformers, open_clip, sentence-transformers and Immich names, and models of
single domains. For each, a folder of random weights in the same layout is read and compared with
its reference implementation in `test_golden.py` and `test_sentence_transformers.py`; those with the
most models are compared at full width in `tests/peers/test_full_width.py` and
`test_architectures.py`.
"""

import csv
import json
from pathlib import Path

import pytest

import vlm
from vlm.weights import catalogue
from vlm.weights.hub import is_hub_id
from vlm.weights.registry import open_checkpoint

GOLDEN = Path(__file__).parent / "golden"
with (Path(vlm.__file__).parent / "weights" / "popular_models.csv").open(newline="") as rows:
    ROWS = list(csv.DictReader(rows))
READ = [row for row in ROWS if row["reads"] == "yes"]


def test_all_30_are_read():
    names = [row["model"] for row in ROWS]
    assert len(set(names)) == 30
    assert all(map(is_hub_id, names))
    assert len(READ) == 30


@pytest.mark.parametrize("row", READ, ids=lambda row: row["model"])
def test_a_folder_of_its_layout_opens(row, tmp_path):
    folder = GOLDEN / row["checked_by"]
    if row["layout"] == "sentence-transformers":  # CLIP in a folder of its own
        (tmp_path / "0_CLIPModel").symlink_to(GOLDEN / "hf_clip")
        kind = "sentence_transformers.models.CLIPModel"
        modules = [{"idx": 0, "path": "0_CLIPModel", "type": kind}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        folder = tmp_path
    checkpoint = open_checkpoint(vlm.paths.as_path(folder))
    assert checkpoint.tensors.shapes
    entry = catalogue.resolve(row["model"])
    assert entry is None or entry.name == row["model"]
