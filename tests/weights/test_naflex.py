"""NaFlex: images of any aspect, against what transformers and open_clip recorded."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.inputs.naflex import target_size
from vlm.weights import naflexvit

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module", params=["hf_naflex", "oc_naflex"])
def folder(request):
    return GOLDEN / request.param


@pytest.fixture(scope="module")
def bundle(folder):
    return load(folder)


@pytest.fixture(scope="module")
def golden(folder):
    return np.load(folder / "naflex.npz")


def test_end_to_end(bundle, golden):
    raw = [golden[f"image/{i}"] for i in range(len(golden["z_image"]))]
    z_image = bundle.encode_image(raw)
    z_text = bundle.encode_text(golden["texts"].tolist())
    assert np.abs(z_image - golden["z_image"]).max() < 3e-6
    assert np.abs(z_text - golden["z_text"]).max() < 2e-6
    logits = bundle.logit_scale * z_image @ z_text.T + bundle.logit_bias
    assert np.abs(logits - golden["logits"]).max() < 2e-5


def test_patches_are_theirs(bundle, golden):
    raw = [golden[f"image/{i}"] for i in range(len(golden["z_image"]))]
    patches = bundle.preprocess(raw)
    for i, (h, w) in enumerate(golden["shapes"]):
        assert patches.mask[i].sum() == h * w == golden["mask"][i].sum()
        ours = patches.pixels[i, : h * w].reshape(h * w, -1)
        assert np.abs(ours - golden["pixels"][i, : h * w]).max() < 1e-6
        # Weights over the grid are those of a resize: each row of them sums to one.
        assert np.allclose(patches.rows[i, : h * w].sum(-1), 1, atol=1e-6)
        assert np.allclose(patches.columns[i, : h * w].sum(-1), 1, atol=1e-6)


def test_padding_and_company_are_invisible(bundle, golden):
    """An image's embedding does not depend on the shapes of the others in its batch."""
    raw = [golden[f"image/{i}"] for i in range(len(golden["z_image"]))]
    together = bundle.encode_image(raw)
    alone = np.concatenate([bundle.encode_image([image]) for image in raw])
    assert np.allclose(together, alone, atol=2e-6)
    assert bundle.encode_image([]).shape == (0, bundle.embed_dim)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (480, 640), (5000, 3), (7, 7), (333, 100)])
@pytest.mark.parametrize("budget", [1, 2, 31, 256])
def test_sizes_fill_the_budget_and_never_pass_it(size, budget):
    height, width = target_size(*size, 16, budget)
    assert height % 16 == width % 16 == 0
    count = height * width // 256
    assert count >= 1
    if count > budget:  # an aspect that no budget holds still needs a patch along its short side
        assert min(height, width) == 16


def test_open_clips_tower_there_and_back(tmp_path, monkeypatch):
    ours = load(GOLDEN / "oc_naflex")
    with pytest.raises(CheckpointError, match=r"none of timm's vision towers is .* nearest"):
        ours.save(tmp_path / "theirs", format="open_clip")
    name = "naflexvit_base_patch16_siglip"
    monkeypatch.setitem(naflexvit.TOWERS, name, ours.config.vision)
    ours.save(tmp_path / "theirs", format="open_clip")
    theirs = GOLDEN / "oc_naflex" / "open_clip_model.safetensors"
    with safe_open(theirs, "np") as a, safe_open(tmp_path / "theirs" / theirs.name, "np") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(np.array_equal(a.get_tensor(key), b.get_tensor(key)) for key in b.keys())  # noqa: SIM118
    assert load(tmp_path / "theirs").preprocess.config == ours.preprocess.config
    ours.save(tmp_path / "transformers", format="huggingface")
    again = load(tmp_path / "transformers")
    golden = np.load(GOLDEN / "oc_naflex" / "naflex.npz")
    raw = [golden[f"image/{i}"] for i in range(len(golden["z_image"]))]
    assert np.abs(again.encode_image(raw) - golden["z_image"]).max() < 3e-6


def test_a_number_of_patches_is_for_naflex_towers(tmp_path):
    shutil.copytree(GOLDEN / "oc_siglip", tmp_path / "copy")
    file = tmp_path / "copy" / "open_clip_config.json"
    about = json.loads(file.read_text())
    about["model_cfg"]["vision_cfg"]["image_seq_len"] = 576
    file.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"image_seq_len is 576, .* no NaFlex tower"):
        load(tmp_path / "copy")
