"""Old names work for one minor version, with a DeprecationWarning that names the new one."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import vlm
from vlm import config
from vlm._deprecation import FIELDS, rename_options
from vlm.cli import main
from vlm.cli.train import experiment_of
from vlm.config import DataConfig, Experiment, OptimizerConfig, from_dict, load_config, to_dict

GOLDEN = Path(__file__).parent / "weights" / "golden"
OLD_FIELDS = [(cls, old, new) for cls, fields in FIELDS.items() for old, new in fields.items()]


@pytest.mark.parametrize(("cls", "old", "new"), OLD_FIELDS)
def test_an_old_field_is_renamed(cls, old, new):
    kind = getattr(config, cls)
    fields = {field.name for field in dataclasses.fields(kind)}
    assert new in fields
    assert old not in fields


def test_a_constructor_accepts_an_old_field():
    with pytest.warns(DeprecationWarning, match=r"DataConfig\.lanes is renamed to DataConfig\.int"):
        data = DataConfig(lanes=4)  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning, match="lanes"):
        assert data.lanes == data.interleave == 4  # pyright: ignore
    with pytest.warns(DeprecationWarning, match="lanes"):
        assert dataclasses.replace(data, lanes=8).interleave == 8  # pyright: ignore
    with pytest.raises(AttributeError, match="'OptimizerConfig' object has no attribute 'lanes'"):
        OptimizerConfig().lanes  # noqa: B018  # pyright: ignore


def test_a_run_folder_with_old_fields_is_read(tmp_path):
    old = {
        "image_sizes": [[0.5, 112]],
        "preprocess": {"fill": [1, 2, 3], "crop_offset": "floor"},
        "optimizer": {"nonfinite": "skip", "start_decay": 0.1},
        "data": {"keep": [{"feature": "score", "at_least": 5}], "augment": {"lines": 0.25}},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(old))
    with pytest.warns(DeprecationWarning, match="is renamed to") as warned:
        experiment = load_config(file)
    assert len(warned) == 7
    assert experiment == from_dict(
        Experiment,
        {
            "resolution_schedule": [[0.5, 112]],
            "preprocess": {"pad_value": [1, 2, 3], "crop_rounding": "floor"},
            "optimizer": {"on_nonfinite": "skip", "l2_sp": 0.1},
            "data": {
                "filters": [{"feature": "score", "at_least": 5}],
                "augment": {"morphology": 0.25},
            },
        },
    )
    assert from_dict(Experiment, to_dict(experiment)) == experiment


def test_old_options_are_renamed():
    old = ["--none", "a photo.", "--data.lanes=4", "--image-sizes", "0.5", "112", "--tower=image"]
    with pytest.warns(DeprecationWarning, match="is renamed to") as warned:
        new = rename_options([*old, "--tower", "image", "--keep-checkpoints", "3", "image"])
    assert len(warned) == 5
    assert new == [
        "--other-label", "a photo.", "--data.interleave=4", "--resolution-schedule", "0.5", "112",
        "--tower=vision", "--tower", "vision", "--keep-checkpoints", "3", "image",
    ]  # fmt: skip


def test_a_command_accepts_old_options(tmp_path):
    with pytest.warns(DeprecationWarning, match=r"--optimizer\.start-decay is renamed to --opt"):
        experiment = experiment_of([str(tiny.folder() / "shapes.py"), "--optimizer.start-decay=1"])
    assert experiment.optimizer.l2_sp == 1.0
    with pytest.warns(DeprecationWarning, match="--tower image is renamed to --tower vision"):
        assert main(["export", str(GOLDEN / "oc_vit"), str(tmp_path / "o"), "--tower=image"]) == 0


@pytest.mark.untyped
def test_the_vision_tower_by_its_old_name():
    with pytest.warns(DeprecationWarning, match='tower="image" is renamed to tower="vision"'):
        model = vlm.load(GOLDEN / "oc_vit", tower="image")  # pyright: ignore[reportArgumentType]
    assert model.model.text is None


def test_old_arguments_and_classes():
    model = vlm.load(GOLDEN / "oc_vit")
    with pytest.warns(DeprecationWarning, match=r"none=\) is renamed to other_label="):
        classify = vlm.ZeroShotClassifier(model, ["cat"], none="a photo.")  # pyright: ignore
    assert classify.labels == ("cat", "none of these")
    with pytest.warns(DeprecationWarning, match="ViTConfig"):
        assert vlm.VisionConfig is vlm.ViTConfig  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(DeprecationWarning, match="ViTConfig"):
        assert config.VisionConfig is vlm.ViTConfig  # pyright: ignore[reportAttributeAccessIssue]


def test_old_names_of_heads_and_explanations():
    model = vlm.load(GOLDEN / "oc_vit")
    index = vlm.RetrievalIndex(model)
    index.add(np.eye(2, model.embed_dim), metadata={"label": ["a", "b"]})
    with pytest.warns(DeprecationWarning, match="neighbour_weight="):
        found = vlm.NeighbourClassifier(index, "label", share=0.25)  # pyright: ignore
    assert found.neighbour_weight == 0.25
    explained = vlm.explain(model, Image.new("RGB", (32, 32)), "a cat", method="similarity")
    with pytest.warns(DeprecationWarning, match=r"Explanation\.relevance"):
        assert explained.places is explained.relevance
