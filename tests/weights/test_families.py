"""Families by name: what is unknown, unpaired or of another width is refused before it is read."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights.files import SafetensorsFile, write_safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"


def refuse_to_read(self, name, start=0, stop=None):
    """In place of reading: shapes and names alone decide."""
    raise AssertionError(f"{name} was read")


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(SafetensorsFile, "read", refuse_to_read)


def copy(name: str, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(GOLDEN / name, folder)
    return folder


def with_config(name: str, folder: pathlib.Path, tower: str, **fields) -> pathlib.Path:
    """A folder of open_clip with other fields in the config of a tower."""
    file = copy(name, folder) / "open_clip_config.json"
    values = json.loads(file.read_text())
    values["model_cfg"][tower] |= fields
    file.write_text(json.dumps(values))
    return folder


def with_tensors(name: str, folder: pathlib.Path, change) -> pathlib.Path:
    """A folder of open_clip with other tensors: `change(name, array)`, None leaves one out."""
    file = copy(name, folder) / "open_clip_model.safetensors"
    tensors = SafetensorsFile(file)
    arrays = {n: change(n, tensors.read(n)) for n in tensors.shapes}
    write_safetensors(file, [(n, a) for n, a in arrays.items() if a is not None], {})
    return folder


@pytest.mark.parametrize(
    ("name", "tower", "fields", "message"),
    [
        ("oc_convnext", "vision_cfg", {"timm_model_name": "maxvit_tiny"}, "'maxvit_tiny' is not"),
        ("oc_convnext", "vision_cfg", {"timm_proj": "conv"}, "timm_proj 'conv'"),
        ("oc_convnext", "vision_cfg", {"timm_model_name": "vitamin_base_224"}, "not those of timm"),
        ("oc_eva02", "vision_cfg", {"timm_pool": "avg"}, "timm_pool 'avg'"),
        ("oc_eva02", "vision_cfg", {"timm_model_name": "eva_giant_patch14_224"}, "not those of"),
        ("oc_vitamin", "vision_cfg", {"timm_pool": "map"}, "timm_pool 'map'"),
        ("oc_mobileclip_b", "vision_cfg", {"timm_proj": "linear"}, "timm_proj 'linear'"),
        ("oc_nllb", "text_cfg", {"hf_model_name": "google/mt5-base"}, "not those of 'mt5-base'"),
        ("oc_nllb", "text_cfg", {"hf_model_name": "x/gpt2"}, "put the config.json of"),
        ("oc_nllb", "text_cfg", {"hf_pooler_type": "last_pooler"}, "pooler_type is 'last_pooler'"),
        (
            "oc_xlm_roberta",
            "text_cfg",
            {"hf_pooler_type": "cls_pooler"},
            r"missing .*pooler\.dense",
        ),
        ("oc_biomed", "vision_cfg", {"timm_pool": "map"}, "not those of timm's vit_base_patch16"),
        ("oc_biomed", "vision_cfg", {"timm_proj": None}, "timm_pool '' and timm_proj None"),
        ("oc_biomed", "text_cfg", {"hf_model_name": "x/nobert"}, "'x/nobert', whose sizes vlm"),
        ("oc_bert", "text_cfg", {"hf_proj_type": "mlp"}, r"missing from the file: .*text\.proj\.0"),
        ("oc_xlm_roberta", "text_cfg", {"hf_proj_type": "conv"}, "hf_proj_type is 'conv'"),
        *(
            (name, "text_cfg", {"hf_model_config": options}, f"hf_model_config {message}")
            for name in ("oc_xlm_roberta", "oc_modernbert", "oc_mt5")
            for options, message in (
                ({"hidden_dropout_prob": 0.0, "hidden_act": "relu"}, "has hidden_act 'relu'"),
                (["hidden_act"], r"is \['hidden_act'\], not an object"),
                ("relu", "is 'relu', not an object"),
            )
        ),
        ("oc_vit", "text_cfg", {"variable_text": True}, "variable_text is true"),
    ],
)
def test_unsupported_options_are_named(name, tower, fields, message, tmp_path, unread):
    folder = with_config(name, tmp_path / "model", tower, **fields)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], not an object"),
        ({"rope_parameters": {"full_attention": 3}}, "full_attention is 3, not an object"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has rope_theta"),
        ({"rope_parameters": {"full_attention": {"type": "yarn"}}}, "type is 'yarn'"),
        ({"rope_parameters": {"sliding_attention": {"factor": 2}}}, "has factor 2"),
    ],
)
def test_rotary_settings_of_modernbert_are_refused(change, message, tmp_path, unread):
    folder = copy("oc_modernbert", tmp_path / "model")
    file = folder / "config.json"
    about = json.loads(file.read_text()) if file.exists() else {"model_type": "modernbert"}
    file.write_text(json.dumps(about | change))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["oc_convnext", "oc_eva02", "oc_vitamin", "oc_mobileclip_b"])
def test_an_image_tower_without_its_text_is_refused(name, tmp_path, monkeypatch):
    image = ("visual.", "logit_")
    folder = with_tensors(name, tmp_path / "model", lambda n, x: x if n.startswith(image) else None)
    monkeypatch.setattr(SafetensorsFile, "read", refuse_to_read)
    with pytest.raises(CheckpointError, match=r"missing from the file: .*token_embedding"):
        load(folder)


@pytest.mark.parametrize("name", ["oc_xlm_roberta", "oc_nllb"])
def test_a_text_tower_without_its_image_is_refused(name, tmp_path, monkeypatch):
    folder = with_tensors(
        name, tmp_path / "model", lambda n, x: None if n.startswith("visual.") else x
    )
    monkeypatch.setattr(SafetensorsFile, "read", refuse_to_read)
    with pytest.raises(CheckpointError, match=r"missing from the file: .*visual\."):
        load(folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("oc_convnext", "visual.trunk.stages.1.downsample.1.weight"),
        ("oc_eva02", "visual.trunk.blocks.1.mlp.norm.weight"),
        ("oc_vitamin", "visual.trunk.blocks.0.mlp.w1.weight"),
        ("oc_mobileclip_b", "visual.trunk.patch_embed.backbone.1.bn.weight"),
        ("oc_xlm_roberta", "text.proj.2.weight"),
        ("oc_nllb", "text.transformer.layers.1.fc2.weight"),
    ],
)
def test_weights_of_another_width_are_refused(name, tensor, tmp_path, monkeypatch):
    folder = with_tensors(
        name, tmp_path / "model", lambda n, x: np.repeat(x, 2, axis=-1) if n == tensor else x
    )
    monkeypatch.setattr(SafetensorsFile, "read", refuse_to_read)
    with pytest.raises(CheckpointError, match=f"of another shape: {tensor.replace('.', '[.]')}"):
        load(folder)


def test_a_family_of_transformers_that_is_not_known_is_refused(tmp_path, unread):
    file = copy("hf_altclip", tmp_path / "model") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "kosmos-2"}))
    with pytest.raises(CheckpointError, match=r"is 'kosmos-2': vlm supports clip, .*altclip"):
        load(tmp_path / "model")
