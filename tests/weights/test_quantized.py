"""Quantized weights of other libraries, as `make_quantized.py` stored them, and refusals."""

import json
import logging
import pathlib
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_golden import GOLDEN, unit

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights.files import SafetensorsFile, write_safetensors

QUANTIZED = pathlib.Path(__file__).parent / "quantized"
NAMES = sorted(path.name for path in QUANTIZED.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_those_of_the_reference(name):
    bundle, golden = load(QUANTIZED / name), np.load(QUANTIZED / name / "outputs.npz")
    z_image = np.asarray(bundle.model.encode_image(jnp.asarray(golden["pixels"])))
    z_text = np.asarray(bundle.model.encode_text(jnp.asarray(golden["tokens"])))
    assert np.abs(z_image - unit(golden["z_image"])).max() < 2e-6
    assert np.abs(z_text - unit(golden["z_text"])).max() < 2e-6
    other = load(GOLDEN / "hf_clip").model.encode_image(jnp.asarray(golden["pixels"]))
    assert np.abs(z_image - np.asarray(other)).max() > 1e-5  # the weights were rounded


def test_a_layout_is_read_in_half_precision_and_written_back(tmp_path):
    bundle = load(QUANTIZED / "compressed_int8", dtype="bfloat16")
    assert bundle.model.text.embedding[...].dtype == jnp.bfloat16
    assert str(load(QUANTIZED / "fp8", dtype="stored").model.text.embedding[...].dtype) == "float32"
    load(QUANTIZED / "quanto_int8").save(tmp_path / "out", "huggingface")
    np.testing.assert_array_equal(
        load(tmp_path / "out").encode_text(["a cat"]),
        load(QUANTIZED / "quanto_int8").encode_text(["a cat"]),
    )


def copied(name, folder, tensors=None, **config):
    """A copy of a quantized folder with changes to its config and its tensors."""
    shutil.copytree(QUANTIZED / name, folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = values.get("quantization_config", {}) | config
    (folder / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        file = SafetensorsFile(folder / "model.safetensors")
        arrays = {key: file.read(key) for key in file.shapes}
        tensors(arrays)
        (folder / "model.safetensors").unlink()
        write_safetensors(folder / "model.safetensors", arrays.items(), {})
    return folder


LAYER = "text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("fp8", {"quant_method": "torchao"}, "'torchao', where its file layout changes between"),
        ("fp8", {"quant_method": "gptq"}, "'gptq', where weights are packed .*vlm reads bitsandb"),
        ("fp8", {"quant_method": "new"}, "quant_method is 'new': get the model in float32"),
        ("fp8", {"quant_method": None}, "quant_method is None"),
        ("fp8", {"quant_method": ["fp8"]}, "quant_method is"),
        ("fp8", {"weight_block_size": [16]}, "not two sizes of a tile"),
        ("fp8", {"weight_block_size": [16, 0]}, "must be from 1"),
        ("fp8", {"weight_block_size": [8, 8]}, "not the tiles of"),
        ("bitsandbytes", {"load_in_8bit": False}, "bitsandbytes in 4 bits"),
        ("bitsandbytes", {"load_in_8bit": "yes"}, "not true or false"),
        ("compressed_int8", {"format": "pack-quantized"}, "format is 'pack-quantized': vlm reads"),
        ("compressed_int8", {"config_groups": 3}, "not an object of fields"),
        ("compressed_int8", {"config_groups": {"g": {"format": "marlin-24"}}}, "'marlin-24'"),
        ("compressed_int8", {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        (
            "compressed_int8",
            {"transform_config": {"config_groups": {"R1": {}}}},
            "transform_config, which vlm does not support",
        ),
    ],
)
def test_other_layouts_are_refused_by_name(name, config, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(copied(name, tmp_path / "m", **config))
    assert len(str(refusal.value)) < 500


def scales(suffix, shape):
    def change(arrays):
        arrays[LAYER + suffix] = np.ones(shape, np.float32)

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("compressed_int8", scales(".weight_scale", (7, 1)), "has scales of shape"),
        ("compressed_int8", scales(".weight_scale", (1, 7)), "has scales of shape"),
        ("compressed_int8", scales(".weight_scale", (0, 1)), "has scales of shape"),
        ("compressed_int8", scales(".weight_scale", (40, 1, 1)), "has scales of shape"),
        ("compressed_int8_zero", scales(".weight_zero_point", (24, 1)), "for scales of"),
        ("quanto_int8", scales(".weight._scale", (7,)), "neither one scale"),
        ("quanto_int8", scales(".weight._scale", (7, 1)), "neither one scale"),
        ("quanto_int8", scales(".weight._scale", (40, 1, 1)), "neither one scale"),
        ("bitsandbytes", scales(".weight_format", ()), "tiled layout of old versions"),
        ("bitsandbytes", scales(".SCB", (7,)), "of shape"),
        ("compressed_int8", lambda arrays: arrays.pop(f"{LAYER}.weight"), "weight of shape None"),
        ("bitsandbytes", lambda arrays: arrays.pop(f"{LAYER}.weight"), "weight of None"),
        ("quanto_int8", lambda arrays: arrays.pop(f"{LAYER}.weight._scale"), "has no"),
        (
            "compressed_int8",
            lambda arrays: arrays.pop(f"{LAYER}.weight_scale"),
            "as int8, as a quantized model",
        ),
        (
            "fbgemm_fp8",
            lambda x: x.update({f"{LAYER}.weight_scale_inv": x.pop(f"{LAYER}.weight_scale")}),
            "without a place in the model|as a quantized",
        ),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit(name, change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(copied(name, tmp_path / "m", change))


@pytest.mark.parametrize(
    ("size", "shape", "tiles"),
    [([24, 16], (40, 24), (2, 2)), ([40, 16], (40, 24), (1, 2)), ([16, 24], (40, 24), (3, 1))],
)
def test_tiles_that_do_not_divide_a_matrix(size, shape, tiles, tmp_path):
    """Also one row or column of tiles, whose scales look like those of rows or groups."""
    scale = np.arange(1, 1 + tiles[0] * tiles[1], dtype=np.float32).reshape(tiles)

    def change(arrays):
        for name in [n for n in arrays if n.endswith("_scale_inv") and not n.startswith(LAYER)]:
            weight = arrays[name.removesuffix("_scale_inv")]
            arrays[name] = np.ones(-(-np.array(weight.shape) // size), np.float32)
        arrays[f"{LAYER}.weight"] = np.ones(shape, ml_dtypes.float8_e4m3fn)
        arrays[f"{LAYER}.weight_scale_inv"] = scale

    bundle = load(copied("fp8", tmp_path / "m", change, weight_block_size=size))
    kernel = np.asarray(bundle.model.text.transformer.blocks.mlp.up.kernel[...])[0]
    expected = scale.repeat(size[0], 0)[: shape[0]].repeat(size[1], 1)[:, : shape[1]]
    np.testing.assert_array_equal(kernel.T, expected)


def test_quanto_scales_in_a_row_are_of_the_rows(tmp_path):
    """Also of a square matrix, where they could be multiplied with its columns."""
    layer = "text_model.encoder.layers.0.self_attn.q_proj"

    def change(arrays):
        arrays[f"{layer}.weight._scale"] = arrays[f"{layer}.weight._scale"].reshape(-1)

    changed = load(copied("quanto_int8", tmp_path / "m", change)).encode_text(["a cat"])
    np.testing.assert_array_equal(changed, load(QUANTIZED / "quanto_int8").encode_text(["a cat"]))


def test_quanto_of_fewer_bits_is_refused(tmp_path):
    folder = copied("quanto_int8", tmp_path / "m")
    file = folder / "quanto_qmap.json"
    layers = json.loads(file.read_text())
    layers[LAYER]["weights"] = "qint4"
    file.write_text(json.dumps(layers))
    with pytest.raises(CheckpointError, match="'qint4', not of 8 bits"):
        load(folder)


def test_quantized_activations_are_announced(tmp_path, caplog):
    def add(arrays):
        arrays[f"{LAYER}.input_scale"] = np.ones(1, np.float32)

    with caplog.at_level(logging.WARNING):
        load(copied("compressed_fp8", tmp_path / "m", add))
    assert "activations are not quantized here" in caplog.text


def test_numbers_of_8_bits_without_scales_are_parameters(tmp_path):
    """As a plain cast to fp8 stores them; beside a scale they are refused."""
    shutil.copytree(GOLDEN / "hf_clip", tmp_path / "m")
    file = SafetensorsFile(tmp_path / "m/model.safetensors")
    arrays = {key: file.read(key) for key in file.shapes}
    values = arrays[f"{LAYER}.weight"].astype(ml_dtypes.float8_e4m3fn)
    arrays[f"{LAYER}.weight"] = values
    (tmp_path / "m/model.safetensors").unlink()
    write_safetensors(tmp_path / "m/model.safetensors", arrays.items(), {})
    kernel = load(tmp_path / "m").model.text.transformer.blocks.mlp.up.kernel[...]
    np.testing.assert_array_equal(np.asarray(kernel[0]), values.astype(np.float32).T)


def test_gguf_is_refused_with_the_reason(tmp_path):
    file = tmp_path / "ggml-model-f16.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0")
    for path in (file, tmp_path):
        with pytest.raises(CheckpointError, match="is in GGUF, which lacks the logit scale"):
            load(path)
