"""big_vision's `.npz` files, flat and stacked, in float32 and bfloat16."""

import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["bv_siglip", "bv_stacked_bfloat16"])
def test_towers_compute_what_theirs_do(name):
    bundle = load(GOLDEN / name / "model.npz")
    golden = np.load(GOLDEN / name / "expected.npz")
    z_image = np.asarray(bundle.model.encode_image(jnp.asarray(golden["pixels"])))
    z_text = np.asarray(bundle.model.encode_text(jnp.asarray(golden["tokens"])))
    assert np.abs(z_image - golden["z_image"]).max() < 2e-6
    assert np.abs(z_text - golden["z_text"]).max() < 2e-6
    logits = bundle.logit_scale * z_image @ z_text.T + bundle.logit_bias
    assert np.abs(logits - golden["logits"]).max() < 2e-5
    assert bundle.loss == "sigmoid"
    assert bundle.tokenizer("Two dogs").tolist()[0][-1] == 1


def test_without_its_vocabulary_says_where_to_get_it(tmp_path):
    shutil.copy(GOLDEN / "bv_siglip" / "model.npz", tmp_path)
    with pytest.raises(CheckpointError, match=r"put the SentencePiece file .* beside the \.npz"):
        load(tmp_path / "model.npz")


def test_corrupt_files(tmp_path):
    whole = (GOLDEN / "bv_siglip" / "model.npz").read_bytes()
    shutil.copy(GOLDEN / "spiece.model", tmp_path / "sentencepiece.model")
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "model.npz").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"corrupt or no \.npz"):
            load(tmp_path / "model.npz")
    spoiled = bytearray(whole)
    spoiled[len(whole) // 3 : len(whole) // 3 + 64] = bytes(64)
    (tmp_path / "model.npz").write_bytes(spoiled)
    with pytest.raises(CheckpointError, match=r"corrupt|is damaged in"):
        load(tmp_path / "model.npz")


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "model.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="objects, not numbers"):
        load(tmp_path / "model.npz")


def test_parameters_that_do_not_fit_are_listed(tmp_path):
    flat = dict(np.load(GOLDEN / "bv_siglip" / "model.npz"))
    del flat["params/img/Transformer/encoderblock_1/LayerNorm_1/bias"]
    flat["params/img/extra"] = np.zeros(3)
    flat["params/txt/head/bias"] = np.zeros(5, np.float32)
    np.savez(tmp_path / "model.npz", **flat)
    shutil.copy(GOLDEN / "spiece.model", tmp_path / "sentencepiece.model")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model.npz")
    message = str(caught.value)
    assert (
        "1 parameter missing from the file: img/Transformer/encoderblock_1/LayerNorm_1/bias"
        in message
    )
    assert "1 parameter in the file without a place in the model: img/extra" in message
    assert "txt/head/bias (5,) (the model has (24,))" in message
