"""The thirty image-text models with the most downloads a month that public listings show.

No single dated listing could be read. The figures, which `popular_models.csv` has, are of a
catalogue of Hub figures (after July 2025) and of the Hub's own pages; those of one model differ up
to four times between dates, so the order after the first ten is weak. For each model that is read,
a folder of random weights in the same layout is compared with its reference implementation in
`test_golden.py` or beside its family; those with the most downloads are compared at full width in
`tests/peers/test_full_width.py` and `test_architectures.py`.
"""

import csv
import json
from pathlib import Path

import pytest

import vlm
from vlm.errors import CheckpointError
from vlm.weights import catalogue
from vlm.weights.hub import is_hub_id
from vlm.weights.registry import open_checkpoint

GOLDEN = Path(__file__).parent / "golden"
with (Path(vlm.__file__).parent / "weights" / "popular_models.csv").open(newline="") as rows:
    ROWS = list(csv.DictReader(rows))
READ = [row for row in ROWS if row["reads"] == "yes"]


def test_28_of_30_are_read():
    names = [row["model"] for row in ROWS]
    assert len(set(names)) == 30
    assert all(map(is_hub_id, names))
    downloads = [int(row["downloads"]) for row in ROWS]
    assert downloads == sorted(downloads, reverse=True)
    assert len(READ) == 28


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


@pytest.mark.parametrize("row", [row for row in ROWS if row not in READ], ids=lambda r: r["model"])
def test_the_others_are_refused_by_name(row, tmp_path):
    about = {"model_type": row["checked_by"], "architectures": ["Model"]}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=row["checked_by"]):
        vlm.load(tmp_path)
