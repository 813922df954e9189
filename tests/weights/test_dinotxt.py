"""dino.txt's two files, against outputs of its own code: make_dinotxt.py."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from seeded import seeded

import vlm
from vlm.errors import CheckpointError, ConfigError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dinotxt"
NAME = "dinov3_vitl16_dinotxt_tet1280d20h24l"


def weight(name, shape):
    """The weights of make_dinotxt.py."""
    if name == "logit_scale":
        return np.full(shape, 2.3, np.float32)
    inside = f"visual_model.backbone.{name}"
    full = name if name.startswith(("visual_model.", "text_model.")) else inside
    return 0.5 * name.endswith("gamma") + seeded(full.replace("ln_", "norm_"), tuple(shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("dinotxt")
    for file, shapes in json.loads((GOLDEN / "shapes.json").read_text()).items():
        tensors = {name: weight(name, shape).astype(np.float32) for name, shape in shapes.items()}
        save_file(tensors, out / file.replace(".pth", ".safetensors"))
    return out


@pytest.fixture(scope="module")
def model(folder):
    return vlm.load(folder, architecture=NAME)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_embeds_as_its_own_code(model, tmp_path):
    golden = np.load(GOLDEN / "image.npz")
    raw, texts = [golden[f"image/{i}"] for i in range(3)], golden["texts"].tolist()
    assert np.array_equal(model.tokenizer(texts), golden["tokens"])
    z_image, z_text = model.encode_image(raw), model.encode_text(texts)
    assert np.abs(z_image - unit(golden["z_image"])).max() < 3e-6
    assert np.abs(z_text - unit(golden["z_text"])).max() < 3e-6
    logits = model.logit_scale * z_image @ z_text.T
    assert np.abs(logits - golden["logits"]).max() < 3e-5
    model.save(tmp_path / "bundle")
    assert np.array_equal(vlm.load(tmp_path / "bundle").encode_image(raw), z_image)
    with pytest.raises(CheckpointError, match=r"no place for vision\.pool 'class_mean'|class_mean"):
        model.save(tmp_path / "back", format="huggingface")


def test_larger_images(folder):
    larger = vlm.load(folder, architecture=NAME, image_size=448)
    assert larger.preprocess.config.short_side == 512  # as its authors' transform for 512 pixels
    assert larger.encode_image(np.zeros((50, 60, 3), np.uint8)).shape == (1, 256)


def test_a_patch_has_no_embedding(model):
    with pytest.raises(ConfigError, match="a patch has no embedding of its own"):
        vlm.heads.image_tokens(model, np.zeros((50, 60, 3), np.uint8))


def test_folders_without_both_files_are_refused(folder, tmp_path):
    backbone = load_file(folder / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="is for a folder with two files"):
        vlm.load(folder / "backbone.safetensors", architecture=NAME)
    save_file(backbone, tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="has 0 files of the vision head and text encoder"):
        vlm.load(tmp_path, architecture=NAME)
    save_file(backbone, tmp_path / "again.safetensors")
    with pytest.raises(CheckpointError, match="has 2 files of the backbone"):
        vlm.load(tmp_path, architecture=NAME)
    (tmp_path / "again.safetensors").unlink()
    rest = load_file(folder / "head_and_text.safetensors")
    save_file(rest | {"extra": np.zeros(1, np.float32)}, tmp_path / "rest.safetensors")
    with pytest.raises(CheckpointError, match="without a place in the model: extra"):
        vlm.load(tmp_path, architecture=NAME)
    del rest["text_model.head.linear_projection.weight"]
    save_file(rest, tmp_path / "rest.safetensors")
    with pytest.raises(CheckpointError, match=r"has not the weights of dino\.txt"):
        vlm.load(tmp_path, architecture=NAME)


def test_fields_of_the_head_need_its_pool():
    with pytest.raises(ConfigError, match='head_depth is 2 and has no effect: set pool to "class_'):
        vlm.ViTConfig(head_depth=2)
    with pytest.raises(ConfigError, match="its width 1536 must equal embed_dim 768"):
        vlm.ModelConfig(vlm.ViTConfig(pool="class_mean"), embed_dim=768)
