"""Other dual encoders of transformers: what is written back, and what is refused.

Their outputs are compared in test_golden.py.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import vlm
from vlm.errors import CheckpointError, ConfigError
from vlm.weights import writing_parts

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("hf_vt_clip_roberta", "vision-text-dual-encoder"),
        ("hf_vt_vit_bert", "vision-text-dual-encoder"),
        ("hf_vt_dino_clip", "vision-text-dual-encoder"),
        ("hf_clipseg", "clip"),
        ("hf_owlvit", "clip"),
        ("hf_owlv2", "clip"),
        ("hf_aimv2", "aimv2"),
        ("hf_groupvit", "groupvit"),
    ],
)
def test_models_are_written_back(name, written, tmp_path):
    golden = np.load(GOLDEN / name / "outputs.npz")
    model = vlm.load(GOLDEN / name)
    model.save(tmp_path / "back", format="huggingface")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == written
    again = vlm.load(tmp_path / "back")
    pixels, texts = jnp.asarray(golden["pixels"]), golden["texts"].tolist()
    ours, theirs = model.model.encode_image(pixels), again.model.encode_image(pixels)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.array_equal(model.encode_text(texts), again.encode_text(texts))
    assert model.logit_scale == again.logit_scale


@pytest.mark.parametrize("name", ["hf_blip", "hf_flava"])
def test_parts_of_larger_models_are_not_written_back(name, tmp_path):
    with pytest.raises(CheckpointError, match="no place for"):
        vlm.load(GOLDEN / name).save(tmp_path / "x", format="huggingface")


def changed(name, part, changes, tmp_path):
    """A copy of a golden folder with other fields in its config.json."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values).update(changes)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("hf_vt_vit_bert", "vision_config", {"model_type": "swin"}, "vision_config.model_type is"),
        ("hf_vt_vit_bert", "text_config", {"model_type": "gpt2"}, "text_config.model_type is"),
        ("hf_vt_vit_bert", "text_config", {"is_decoder": True}, "is_decoder is True"),
        ("hf_vt_vit_bert", "text_config", {"pad_token_id": 3}, "pad_token_id is 3"),
        ("hf_vt_clip_roberta", "text_config", {"max_position_embeddings": 2}, "no position"),
        ("hf_vt_clip_roberta", None, {"projection_dim": 8}, "of another shape"),
        ("hf_vt_dino_clip", "vision_config", {"use_swiglu_ffn": True}, "missing from the file"),
        ("hf_clipseg", "text_config", {"hidden_act": "swish"}, "hidden_act is 'swish'"),
        ("hf_owlvit", "vision_config", {"num_hidden_layers": 1}, "without a place in the model"),
        (
            "hf_blip",
            None,
            {"architectures": ["BlipForQuestionAnswering"]},
            "vlm reads BlipForImage",
        ),
        ("hf_blip", "vision_config", {"num_channels": 4}, "4 channels"),
        (
            "hf_flava",
            None,
            {"architectures": ["FlavaImageModel"]},
            "vlm reads FlavaModel and Flava",
        ),
        ("hf_groupvit", "vision_config", {"depths": 3}, "not a list of whole numbers"),
        ("hf_groupvit", "vision_config", {"depths": [4]}, "another length than depths"),
        ("hf_groupvit", "vision_config", {"num_output_groups": [4, 3, 3]}, "as many segments as"),
        ("hf_groupvit", "vision_config", {"assign_mlp_ratio": 4}, "assign_mlp_ratio is 4, not two"),
        ("hf_groupvit", "vision_config", {"num_group_tokens": [6, 0, 0]}, "only the last stage"),
        ("hf_groupvit", None, {"projection_intermediate_dim": 8}, "of another shape"),
        ("hf_flava", "image_config", {"num_hidden_layers": 1}, "without a place in the model"),
        ("hf_flava", "text_config", {"pad_token_id": 3}, "belong to different models"),
        ("hf_flava", None, {"projection_dim": 8}, "of another shape"),
        ("hf_aimv2", "vision_config", {"use_head": False}, "without its pooling head has no embed"),
        ("hf_aimv2", "vision_config", {"is_native": True}, "is_native is True: vlm supports False"),
        ("hf_aimv2", "text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            "hf_aimv2",
            "text_config",
            {"mlp_bias": True},
            r"missing from the file: .*ffn\.gate_proj\.",
        ),
        ("hf_aimv2", None, {"max_logit_scale": 0.5}, "max_logit_scale is 0.5: it must be greater"),
    ],
)
def test_configs_that_differ_are_refused_by_name(name, part, changes, message, tmp_path):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        vlm.load(changed(name, part, changes, tmp_path))


def test_tensors_that_differ_are_refused_by_name(tmp_path):
    folder = shutil.copytree(GOLDEN / "hf_clipseg", tmp_path / "clipseg")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"clip.extra": np.zeros(2, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"without a place in the model: clip\.extra"):
        vlm.load(folder)
    del tensors["clip.text_projection.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing from the file: clip\.text_projection"):
        vlm.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pad": False}, "turns do_pad off"),
        ({"size": {"height": 32, "width": 40}}, "not a square"),
        ({"size": {"shortest_edge": 32}}, "size.height is None"),
        ({"image_processor_type": "OwlV3ImageProcessor"}, "is 'OwlV3ImageProcessor'"),
    ],
)
def test_other_processors_of_owlv2_are_refused(changes, message, tmp_path):
    folder = shutil.copytree(GOLDEN / "hf_owlv2", tmp_path / "owlv2")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        vlm.load(folder)


def test_owlv2_has_one_resize_backend(tmp_path):
    with pytest.raises(ConfigError, match=r"has the backend .scipy. alone"):
        vlm.load(GOLDEN / "hf_owlv2", resize_backend="pillow")
    with pytest.raises(ConfigError, match="has one form"):
        vlm.inputs.Preprocess(vlm.PreprocessConfig(backend="scipy", resize="squash"))


def test_aimv2_bounds_its_scale_as_transformers_does(tmp_path):
    folder = shutil.copytree(GOLDEN / "hf_aimv2", tmp_path / "aimv2")
    tensors = load_file(folder / "model.safetensors")
    for stored, scale in ((7.0, 100.0), (-2.0, 1.0)):
        tensors["logit_scale"] = np.asarray(stored, np.float32)
        save_file(tensors, folder / "model.safetensors")
        assert np.isclose(vlm.load(folder).logit_scale, scale, rtol=1e-6)


def test_aimv2_with_a_larger_scale_is_written_with_its_bound(tmp_path):
    model = vlm.load(GOLDEN / "hf_aimv2")
    model.model.logit_scale.set_value(jnp.log(150.0))
    model.save(tmp_path / "back", format="huggingface")
    assert vlm.load(tmp_path / "back").logit_scale == model.logit_scale


def test_aimv2_with_trained_biases_is_written_with_them(tmp_path):
    model = vlm.load(GOLDEN / "hf_aimv2")
    bias = model.model.text.transformer.blocks.mlp.up.bias
    bias.set_value(bias.get_value() + 0.5)
    pixels = jnp.asarray(np.load(GOLDEN / "hf_aimv2" / "outputs.npz")["pixels"])
    model.save(tmp_path / "back", format="huggingface")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    on = {
        (part, field): values[f"{part}_config"][field]
        for part in ("vision", "text")
        for field in ("qkv_bias", "mlp_bias")
    }
    assert [place for place, value in on.items() if value] == [("text", "mlp_bias")]
    again = vlm.load(tmp_path / "back")
    assert np.array_equal(model.encode_text(["a cat"]), again.encode_text(["a cat"]))
    assert np.array_equal(model.model.encode_image(pixels), again.model.encode_image(pixels))


def test_aimv2_with_a_part_that_transformers_lacks_is_not_written(tmp_path):
    c = vlm.load(GOLDEN / "hf_aimv2").config
    text = dataclasses.replace(c.text, causal=False)
    with pytest.raises(CheckpointError, match=r"text\.causal False \(True\)"):
        writing_parts.refuse_differences("transformers", dataclasses.replace(c, text=text), c)


def test_groupvit_learns_and_has_no_heat_maps():
    model = vlm.load(GOLDEN / "hf_groupvit")
    images = jnp.asarray(np.load(GOLDEN / "hf_groupvit" / "outputs.npz")["pixels"])
    graph, state = nnx.split(model.model.vision)
    keys = jax.random.split(jax.random.key(0), len(images))

    def loss(state, keys):
        return jnp.square(nnx.merge(graph, state)(images, keys=keys)).sum()

    noisy, gradients = jax.value_and_grad(loss)(state, keys)
    assert noisy != loss(state, None)
    flat = nnx.to_flat_state(gradients)
    still = [".".join(map(str, path)) for path, value in flat if not jnp.any(value[...])]
    # The key bias cancels in a softmax.
    assert all(name.endswith("attention.key.bias") for name in still)
    with pytest.raises(ConfigError, match="merges its patches into segments"):
        vlm.explain(model, np.zeros((40, 40, 3), np.uint8), "a cat")
