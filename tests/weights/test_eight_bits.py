"""Bundles of eight bits: size, embeddings, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from test_golden import GOLDEN
from test_pickle import PICTURES, TEXTS, adapted, bundle

import vlm
from vlm.errors import CheckpointError, ConfigError
from vlm.models import DualEncoder
from vlm.weights import eight_bits
from vlm.weights.files import SafetensorsFile, write_safetensors
from vlm.weights.rules import flat_arrays

KINDS = ("int8", "float8")


@pytest.fixture(scope="module")
def wide():
    """A bundle whose kernels are large enough to be worth quantizing."""
    small = bundle()
    c = small.config
    config = dataclasses.replace(
        c,
        vision=dataclasses.replace(c.vision, width=128, heads=4, mlp_dim=256),
        text=dataclasses.replace(c.text, width=128, heads=4, mlp_dim=256),
        embed_dim=64,
    )
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    return vlm.Bundle(model, small.preprocess, small.tokenizer, "wide")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_takes_a_quarter_and_its_embeddings_stay_close(kind, wide, tmp_path):
    wide.save(tmp_path / "whole")
    wide.save(tmp_path / kind, quantize=kind)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("whole", kind)]
    assert sizes[1] < 0.3 * sizes[0]
    other = vlm.load(tmp_path / kind)
    for encode, inputs in (("encode_image", PICTURES), ("encode_text", TEXTS)):
        ours, wanted = (getattr(model, encode)(inputs) for model in (other, wide))
        assert np.all((ours * wanted).sum(1) > {"int8": 0.9995, "float8": 0.995}[kind])
        assert not np.array_equal(ours, wanted)
    assert other.fingerprint != vlm.load(tmp_path / "whole").fingerprint


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.5 / 127), ("float8", 2**-4)])
def test_a_parameter_is_off_by_rounding_alone(kind, limit, wide, tmp_path):
    wide.save(tmp_path / "m", quantize=kind)
    file = SafetensorsFile(tmp_path / "m/model.safetensors")
    read = dict(flat_arrays(vlm.load(tmp_path / "m").model))
    for name, array in flat_arrays(wide.model):
        whole, stored = np.asarray(array), np.asarray(read[name])
        if f"{name}:scale" not in file.shapes:
            np.testing.assert_array_equal(stored, whole)
            continue
        sizes = zip(whole.shape, file.shapes[f"{name}:scale"], strict=True)
        axis = next(i for i, (size, scales) in enumerate(sizes) if size != scales)
        bound = np.abs(whole).max(axis, keepdims=True) if kind == "int8" else np.abs(whole)
        floor = np.abs(whole).max(axis, keepdims=True) * 2**-9 / 448  # subnormal float8
        assert np.all(np.abs(stored - whole) <= limit * 1.01 * bound + floor), name
    assert np.asarray(read["logit_scale"]).dtype == np.float32


def test_saving_again_changes_nothing(wide, tmp_path):
    """Numbers that were rounded once are exact."""
    wide.save(tmp_path / "one", quantize="int8")
    vlm.load(tmp_path / "one").save(tmp_path / "two", quantize="int8")
    one, two = (dict(flat_arrays(vlm.load(tmp_path / n).model)) for n in ("one", "two"))
    for name, array in one.items():
        np.testing.assert_allclose(np.asarray(two[name]), np.asarray(array), rtol=3e-7, atol=0)


def test_dtypes_towers_and_adapters(wide, tmp_path):
    wide.save(tmp_path / "m", quantize="int8")
    half = vlm.load(tmp_path / "m", dtype="bfloat16", tower="text")
    assert str(half.model.text.embedding[...].dtype) == "bfloat16"
    assert (
        str(vlm.load(tmp_path / "m", dtype="stored").model.text.embedding[...].dtype) == "float32"
    )
    model = adapted()
    model.save(tmp_path / "merged", quantize="float8")
    ours, wanted = vlm.load(tmp_path / "merged").encode_text(TEXTS), model.encode_text(TEXTS)
    assert np.all((ours * wanted).sum(1) > 0.999)


def test_zeros_and_extremes_survive():
    values = np.zeros((64, 64), np.float32)
    values[0, 0], values[1] = 1e30, 1e-30
    for quantize in (eight_bits.quantized, eight_bits.to_float8):
        form = eight_bits.best_form(values, quantize)
        again = form.steps.astype(np.float32) * form.scale
        assert np.isfinite(again).all()
        assert again[0, 0] == pytest.approx(1e30)
        assert not again[2:].any()


@pytest.mark.untyped
def test_an_unknown_type_is_refused(wide, tmp_path):
    with pytest.raises(ConfigError, match=r"quantize.*'int4'"):
        wide.save(tmp_path / "m", quantize="int4")
    assert not (tmp_path / "m").exists()


def test_bad_requests_and_files(wide, tmp_path):
    clip = vlm.load(GOLDEN / "hf_clip")
    with pytest.raises(ConfigError, match="for bundles of vlm, not for huggingface"):
        clip.save(tmp_path / "m", "huggingface", quantize="int8")
    assert not (tmp_path / "m").exists()
    wide.save(tmp_path / "m", quantize="int8")
    about = json.loads((tmp_path / "m/bundle.json").read_text())
    assert about["format"] == 2  # an older vlm says that it cannot read it
    file = SafetensorsFile(tmp_path / "m/model.safetensors")
    arrays = {name: file.read(name) for name in file.shapes}
    scale = next(name for name in arrays if name.endswith(":scale"))
    (tmp_path / "m/model.safetensors").unlink()
    write_safetensors(
        tmp_path / "m/model.safetensors", (arrays | {scale: arrays[scale] * 2}).items(), {}
    )
    with pytest.raises(CheckpointError, match="is not what was saved"):
        vlm.load(tmp_path / "m")
    shape = arrays[scale].shape
    arrays[scale] = np.ones((*shape, 2), np.float32)
    write_safetensors(tmp_path / "m/model.safetensors", arrays.items(), {})
    with pytest.raises(CheckpointError, match=r"of shape .* for a parameter of"):
        vlm.load(tmp_path / "m")
