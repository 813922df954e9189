"""Another image size: positions resized as each family's own code does."""

import pathlib

import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import ConfigError
from vlm.weights.resolution import resize_positions

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize(("name", "size"), [("hf_clip", 42), ("hf_clip_old", 42), ("oc_vit", 49)])
def test_embeddings_at_another_size_are_theirs(name, size):
    bundle = load(GOLDEN / name, image_size=size)
    golden = np.load(GOLDEN / name / "resized.npz")
    expected = golden["z_image"] / np.linalg.norm(golden["z_image"], axis=-1, keepdims=True)
    assert np.abs(bundle.model.encode_image(golden["pixels"]) - expected).max() < 3e-6
    assert bundle.config.vision.image_size == bundle.preprocess.config.image_size == size
    assert bundle.encode_image(np.zeros((9, 7, 3), np.uint8)).shape == (1, bundle.embed_dim)


def test_the_same_size_changes_nothing_and_naflex_takes_a_budget():
    same, plain = load(GOLDEN / "hf_clip", image_size=30), load(GOLDEN / "hf_clip")
    assert same.config == plain.config
    naflex = load(GOLDEN / "hf_naflex", image_size=48)
    assert naflex.preprocess.config.max_patches == 64
    assert naflex.encode_image(np.zeros((90, 20, 3), np.uint8)).shape == (1, naflex.embed_dim)


@pytest.mark.parametrize("positions", ["bicubic", "bicubic_antialias", "zoom"])
def test_resizing_keeps_constants_corners_and_other_tokens(positions):
    rng = np.random.default_rng(0)
    grid = rng.standard_normal((1 + 25, 4)).astype(np.float32)
    out = resize_positions(grid, 5, 8, positions)
    assert out.shape == (65, 4)
    assert np.array_equal(out[0], grid[0])
    flat = resize_positions(np.ones((25, 4), np.float32), 5, 3, positions)
    assert np.allclose(flat, 1, atol=1e-6)
    if positions == "zoom":
        assert np.allclose(out[[1, 8, -8, -1]], grid[[1, 5, -5, -1]], atol=1e-6)


@pytest.mark.parametrize("size", [0, 5, 31, -30])
def test_sizes_that_patches_do_not_tile(size):
    with pytest.raises(ConfigError, match=rf"image_size {size} is not tiled by patches of 6"):
        load(GOLDEN / "hf_clip", image_size=size)
