"""NaFlex: images of any aspect, against what transformers' Siglip2Model recorded."""

import pathlib

import numpy as np
import pytest

from vlm.bundle import load
from vlm.inputs.naflex import target_size

FOLDER = pathlib.Path(__file__).parent / "golden" / "hf_naflex"


@pytest.fixture(scope="module")
def bundle():
    return load(FOLDER)


@pytest.fixture(scope="module")
def golden():
    return np.load(FOLDER / "naflex.npz")


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
