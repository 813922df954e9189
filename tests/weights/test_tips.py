"""TIPSv2: its two forms are one model, and what either does not say is refused by name."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights.files import SafetensorsFile, write_safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
POSITION = "encoder/ToTokenSequence_0/posembed_input"


def copy(name: str, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(GOLDEN / name, folder)
    return folder


def with_fields(folder: pathlib.Path, part: str, fields: dict) -> pathlib.Path:
    """A folder of transformers with other fields in its config, or in that of a tower."""
    file = copy("hf_tipsv2", folder) / "config.json"
    values = json.loads(file.read_text())
    (values[part] if part else values).update(fields)
    file.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("vision_config", {"qkv_bias": False}, r"vision_config.qkv_bias is off"),
        ("vision_config", {"hidden_act": "silu"}, r"vision_config.hidden_act is 'silu'"),
        ("vision_config", {"image_size": [30, 24]}, r"image_size is \[30, 24\], not a whole"),
        ("vision_config", {"mlp_ratio": 0}, r"mlp_ratio is 0: it must be greater than 0"),
        ("vision_config", {"num_register_tokens": 0}, r"without a place in the model: .*register_"),
        ("vision_config", {"num_register_tokens": 2}, r"of another shape: .*register_tokens"),
        ("vision_config", {"use_swiglu_ffn": True}, r"missing from the file: .*mlp[.]w12"),
        ("text_config", {"hidden_size": 48}, r"hidden_size 24 and 48, and TIPSv2 has no project"),
        ("text_config", {"pooling_epsilon": 0.5}, r"pooling_epsilon is 0.5, which changes means"),
        ("text_config", {"pad_token_id": 1}, r"pads texts with token 0, .* pad_token_id 1"),
        ("", {"temperature_init_value": 0}, r"temperature_init_value is 0"),
        ("", {"architectures": ["Tipsv2VisionModel"]}, r"'Tipsv2VisionModel', which lacks a tower"),
    ],
)
def test_unsupported_options_are_named(part, fields, message, tmp_path, monkeypatch):
    def unread(self, name, start=0, stop=None):
        raise AssertionError(f"{name} was read")

    folder = with_fields(tmp_path / "model", part, fields)
    monkeypatch.setattr(SafetensorsFile, "read", unread)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_temperature_is_that_of_the_file_or_else_of_the_config(tmp_path):
    folder = with_fields(tmp_path / "model", "", {"temperature_init_value": 0.25})
    assert load(folder).logit_scale == pytest.approx(1 / 0.07)
    file = folder / "model.safetensors"
    tensors = SafetensorsFile(file)
    arrays = {name: tensors.read(name) for name in tensors.shapes}
    del arrays["temperature"]  # as in the published files
    write_safetensors(file, arrays.items(), {})
    assert load(folder).logit_scale == pytest.approx(4)
    write_safetensors(file, [*arrays.items(), ("temperature", np.float32(-1).reshape(()))], {})
    with pytest.raises(CheckpointError, match=r"temperature -1.0, which must be greater than 0"):
        load(folder)


def test_a_text_of_nothing_embeds_as_nothing():
    """Theirs divides zero by zero there."""
    assert not load(GOLDEN / "hf_tipsv2").encode_text([""]).any()


def test_the_vocabulary_may_be_the_sentencepiece_file_alone(tmp_path):
    folder = copy("hf_tipsv2", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        load(folder)
    shutil.copy(GOLDEN / "tips_jax" / "tokenizer.model", folder)
    with pytest.raises(CheckpointError, match=r"tokenizer has 330 tokens and its .* 291 rows"):
        load(folder)


def test_the_form_for_jax_is_written_as_that_of_transformers(tmp_path):
    ours = load(GOLDEN / "tips_jax", resize_backend="tensor")
    ours.save(tmp_path / "theirs", format="huggingface")
    again = load(tmp_path / "theirs")
    golden = np.load(GOLDEN / "tips_jax" / "outputs.npz")
    raw, texts = [golden["image/0"]], ["a photo of a cat", "Two DOGS!", "ÉCOLE"]
    assert np.abs(ours.encode_image(raw) - again.encode_image(raw)).max() < 1e-6
    assert np.abs(ours.encode_text(texts) - again.encode_text(texts)).max() < 1e-6
    assert np.array_equal(again.tokenizer(texts), ours.tokenizer(texts))
    with pytest.raises(CheckpointError, match=r"Tipsv2Model has no place for images that pillow"):
        load(GOLDEN / "tips_jax").save(tmp_path / "other", format="huggingface")


def test_a_tower_opens_with_the_one_beside_it(tmp_path):
    folder = copy("tips_jax", tmp_path / "model")
    (folder / "small_text.npz").rename(tmp_path / "small_text.npz")
    for path in (folder, folder / "small_vision.npz"):
        with pytest.raises(CheckpointError, match=r"there is no .*small_text.npz: .* two files"):
            load(path)
    (tmp_path / "small_text.npz").rename(folder / "small_text.npz")
    assert load(folder / "small_text.npz").name == "small"
    shutil.copy(folder / "small_text.npz", folder / "other_text.npz")
    with pytest.raises(CheckpointError, match=r"several models, other, small: give the path"):
        load(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.model, which TIPS publishes"):
        load(folder / "small_vision.npz")


def changed(folder: pathlib.Path, change) -> pathlib.Path:
    """The files for JAX with another tower of images, of which `change` is given the tensors."""
    file = copy("tips_jax", folder) / "small_vision.npz"
    arrays = dict(np.load(file))
    change(arrays)
    np.savez(file, **arrays)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update({"blocks.0.attn.qkv.weight": np.zeros(3)}), "in TIPS's PyTorch form"),
        (
            lambda a: a.update({POSITION: np.zeros((1, 4, 5, 24))}),
            "positions for 4 x 5 patches: vlm reads square grids",
        ),
        (lambda a: a.pop("encoder/ToTokenSequence_0/embedding/kernel"), "is no model of TIPS"),
        (lambda a: a.pop("encoder/ToTokenSequence_0/cls"), "missing from the file: .*cls"),
        (lambda a: a.update({"encoder/more": np.zeros(3)}), "in the file without a place"),
    ],
)  # fmt: skip
def test_files_of_another_form_are_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(changed(tmp_path / "model", change))
