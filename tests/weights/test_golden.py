"""Every family against outputs that its own code recorded: see the make_*.py beside this file."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from vlm.bundle import load
from vlm.heads import image_tokens

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if (path / "outputs.npz").exists())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    folder = GOLDEN / request.param
    return load(folder), np.load(folder / "outputs.npz")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_towers_compute_what_theirs_do(case):
    bundle, golden = case
    z_image = np.asarray(bundle.model.encode_image(jnp.asarray(golden["pixels"])))
    z_text = np.asarray(bundle.model.encode_text(jnp.asarray(golden["tokens"])))
    assert np.abs(z_image - unit(golden["z_image"])).max() < 2e-6
    assert np.abs(z_text - unit(golden["z_text"])).max() < 2e-6
    logits = bundle.logit_scale * z_image @ z_text.T + bundle.logit_bias
    logits = logits.max(1) if logits.ndim == 3 else logits  # of several vectors of an image
    assert np.abs(logits - golden["logits"]).max() < 2e-5


def test_pixels_and_tokens_are_theirs(case):
    bundle, golden = case
    raw = [golden[f"image/{i}"] for i in range(len(golden["pixels"]))]
    # OWLv2's processor does not round resized pixels to 8 bits.
    rounded = bundle.preprocess.config.backend == "scipy"
    close = 0.51 / 255 / min(bundle.preprocess.config.std) if rounded else 1e-6
    assert np.abs(bundle.preprocess(raw) - golden["pixels"]).max() < close
    if "texts" in golden:
        tokens = bundle.tokenizer(golden["texts"].tolist())
        assert np.array_equal(tokens, golden["tokens"])


def test_end_to_end(case):
    """Raw images and texts, through buckets and cut padding, give the same embeddings."""
    bundle, golden = case
    raw = [golden[f"image/{i}"] for i in range(len(golden["pixels"]))]
    close = 1e-2 if bundle.preprocess.config.backend == "scipy" else 5e-6  # rounded pixels
    several = bundle.config.vision.vectors > 1
    z_image = image_tokens(bundle, raw) if several else bundle.encode_image(raw)
    assert np.abs(np.asarray(z_image) - unit(golden["z_image"])).max() < close
    if "texts" in golden:
        z_text = bundle.encode_text(golden["texts"].tolist())
        assert np.abs(z_text - unit(golden["z_text"])).max() < 2e-6
