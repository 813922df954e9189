"""Another image size: positions resized as each family's own code does."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from vlm.bundle import load
from vlm.config import ModelConfig, PreprocessConfig, TextConfig
from vlm.errors import ConfigError
from vlm.weights import efficientnet
from vlm.weights.resolution import at_image_size, resize_positions

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "size"),
    [("hf_clip", 42), ("hf_clip_old", 42), ("oc_vit", 49), ("hf_tipsv2", 42), ("tips_jax", 42)],
)
def test_embeddings_at_another_size_are_theirs(name, size):
    bundle = load(GOLDEN / name, image_size=size)
    golden = np.load(GOLDEN / name / "resized.npz")
    expected = golden["z_image"] / np.linalg.norm(golden["z_image"], axis=-1, keepdims=True)
    z_image = bundle.model.encode_image(jnp.asarray(golden["pixels"]))
    assert np.abs(z_image - expected).max() < 3e-6
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


def test_padding_of_tensorflow_efficientnets_follows_the_image_size():
    """timm computes it from the input; that of its other EfficientNets and of ALIGN is fixed."""

    def resized(vision):
        model = ModelConfig(dataclasses.replace(vision, projection="linear"), TextConfig(), 8)
        return at_image_size(model, PreprocessConfig(image_size=75), 96)[0].vision

    tensorflow = efficientnet.padded(
        dataclasses.replace(efficientnet.TOWERS["tf_efficientnet_b0"], image_size=75),
        tensorflow=True,
    )
    assert tensorflow.symmetric
    assert not resized(tensorflow).symmetric
    assert not any(stage.symmetric for stage in resized(tensorflow).stages)
    for fixed in (
        dataclasses.replace(efficientnet.TOWERS["efficientnet_b0"], image_size=75),
        dataclasses.replace(tensorflow, head_width=0),
    ):
        assert resized(fixed).symmetric
        assert resized(fixed).stages == fixed.stages


@pytest.mark.parametrize("size", [0, 5, 31, -30])
def test_sizes_that_patches_do_not_tile(size):
    with pytest.raises(ConfigError, match=rf"image_size {size} is not tiled by patches of 6"):
        load(GOLDEN / "hf_clip", image_size=size)


# ------------------------------------------------------------------------- context length


@pytest.mark.parametrize("length", [7, 19])
@pytest.mark.parametrize("name", ["oc_vit", "oc_coca"])
def test_texts_of_another_length_are_open_clips(name, length):
    bundle = load(GOLDEN / name, context_length=length)
    golden = np.load(GOLDEN / name / "context.npz")
    texts = golden["texts"].tolist()
    assert np.array_equal(bundle.tokenizer(texts), golden[f"tokens/{length}"])
    assert np.abs(bundle.encode_text(texts) - golden[f"z_text/{length}"]).max() < 2e-6
    assert bundle.config.text.context_length == bundle.tokenizer.config.context_length == length


@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "bv_siglip/model.npz"])
def test_elsewhere_a_shorter_text_takes_the_first_positions(name, tmp_path):
    """As transformers' towers do with rows of fewer tokens."""
    whole, cut = load(GOLDEN / name), load(GOLDEN / name, context_length=6)
    texts = ["a photo of a cat", "x", "very long " * 30]
    tokens = cut.tokenizer(texts)
    assert tokens.shape == (3, 6)
    z_text = whole.model.encode_text(jnp.asarray(tokens))
    assert np.abs(cut.encode_text(texts) - z_text).max() < 2e-6
    # What was loaded so is saved so, and a cut bundle is not lengthened again.
    cut.save(tmp_path / "b")
    again = load(tmp_path / "b")
    assert np.array_equal(again.encode_text(texts), cut.encode_text(texts))
    with pytest.raises(ConfigError, match=r"context_length 7: .* for 6 tokens.* at most 6"):
        load(tmp_path / "b", context_length=7)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("hf_clip", 100, "context_length 100: the model has positions for"),
        ("hf_clip", 2, "context_length 2 leaves no position for text after 2 special tokens"),
        ("oc_vit", 0, "context_length is 0: choose a number from 1"),
        ("oc_vit", -3, "context_length is -3: choose a number from 1"),
    ],
)
def test_context_lengths_that_cannot_be(name, length, message):
    with pytest.raises(ConfigError, match=message):
        load(GOLDEN / name, context_length=length)


def test_rotary_positions_are_of_one_size():
    with pytest.raises(ConfigError, match="56: a tower with rotary positions takes only 28"):
        load(GOLDEN / "oc_pe", image_size=56)


def test_pixels_beyond_the_last_patch_are_not_looked_at(tmp_path):
    """SigLIP So400m/14@384 has 27 patches of 14 pixels along a side, and 6 pixels over."""
    whole = load(GOLDEN / "hf_siglip")
    folder = pathlib.Path(shutil.copytree(GOLDEN / "hf_siglip", tmp_path / "untiled"))
    for file, change in (
        ("config.json", lambda v: v["vision_config"].update(image_size=33)),
        ("preprocessor_config.json", lambda v: v.update(size={"height": 33, "width": 33})),
    ):
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))
    untiled = load(folder)
    pixels = np.random.default_rng(0).standard_normal((2, 33, 33, 3)).astype(np.float32)
    expected = whole.model.encode_image(jnp.asarray(pixels[:, :28, :28]))
    assert np.array_equal(untiled.model.encode_image(jnp.asarray(pixels)), expected)
    assert untiled.encode_image(np.zeros((9, 7, 3), np.uint8)).shape == (1, untiled.embed_dim)
