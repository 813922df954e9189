"""Checkpoints of 16 bits are the models of their rounded numbers, to the last bit."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_golden import GOLDEN

from vlm.bundle import load
from vlm.errors import ConfigError
from vlm.weights.rules import flat_arrays

HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
NAMES = sorted(file.parent.name for file in GOLDEN.glob("*/model.safetensors"))


def rounded(name: str, half: str, to, folder, **options):
    """The parameters of a golden checkpoint whose numbers are of 16 bits, kept as `to`."""
    shutil.copytree(GOLDEN / name, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        if value.dtype == np.float32:
            tensors[key] = value.astype(HALVES[half]).astype(to)
    save_file(tensors, file)
    return nnx.to_flat_state(nnx.state(load(folder, **options).model))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_the_number_that_is_kept(name, dtype, tmp_path):
    half = rounded(name, dtype, HALVES[dtype], tmp_path / "half")
    whole = rounded(name, dtype, np.float32, tmp_path / "whole")
    for (path, ours), (_, theirs) in zip(half, whole, strict=True):
        ours, theirs = np.asarray(ours.get_value()), np.asarray(theirs.get_value())
        assert ours.dtype == theirs.dtype, path
        assert np.array_equal(ours, theirs), path


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "hf_vt_vit_bert"])
def test_on_request_parameters_keep_the_type_of_the_file(name, dtype, tmp_path):
    stored = rounded(name, dtype, HALVES[dtype], tmp_path / "half", dtype="stored")
    whole = rounded(name, dtype, np.float32, tmp_path / "whole", dtype="stored")
    for (path, ours), (_, theirs) in zip(stored, whole, strict=True):
        ours, theirs = np.asarray(ours.get_value()), np.asarray(theirs.get_value())
        logit = path[0].startswith("logit_")
        assert ours.dtype == (np.float32 if logit else HALVES[dtype]), path
        assert theirs.dtype == np.float32, path
        assert np.array_equal(ours, theirs.astype(ours.dtype)), path


def test_the_type_of_a_file_is_that_of_its_large_tensors(tmp_path):
    """Norms in float32 beside kernels in float16 are common; float64 is read as float32."""
    for name, kind, expected in (("f16", np.float16, "float16"), ("f64", np.float64, "float32")):
        shutil.copytree(GOLDEN / "hf_clip", tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        for key, value in tensors.items():
            if value.dtype == np.float32 and value.ndim > 1:
                tensors[key] = value.astype(kind)
        save_file(tensors, file)
        arrays = dict(flat_arrays(load(tmp_path / name, dtype="stored").model))
        assert str(arrays["text.norm.scale"].dtype) == expected
        assert str(arrays["text.embedding"].dtype) == expected


@pytest.mark.parametrize("dtype", HALVES)
def test_embeddings_of_half_precision_are_close(dtype):
    whole, half = (load(GOLDEN / "hf_siglip", dtype=kind) for kind in ("float32", dtype))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    for encode, inputs in (("encode_image", list(pixels)), ("encode_text", ["a cat", "two dogs"])):
        ours, wanted = (getattr(model, encode)(inputs) for model in (half, whole))
        assert ours.dtype == np.float32
        assert np.all((ours * wanted).sum(1) > 0.999)


@pytest.mark.parametrize("form", ["vlm", "huggingface"])
def test_a_converted_model_keeps_its_type(form, tmp_path):
    load(GOLDEN / "hf_clip", dtype="float16").save(tmp_path / "out", form)
    kinds = {
        name: value.dtype for name, value in load_file(tmp_path / "out/model.safetensors").items()
    }
    assert kinds.pop("logit_scale") == np.float32
    assert set(kinds.values()) == {np.dtype(np.float16)}
    if form == "huggingface":
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    again = load(tmp_path / "out", dtype="stored").model
    assert str(again.text.embedding[...].dtype) == "float16"


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match="choose float32, bfloat16, float16 or stored"):
        load("there-is-no-such-model", dtype="int4")
