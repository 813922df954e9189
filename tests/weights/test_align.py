"""ALIGN's own: channels that are scaled, what is refused by name, its processor's options."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath

from vlm.bundle import load
from vlm.config import EfficientNetConfig, EfficientNetStage, ModelConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.inputs.preprocess import Preprocess
from vlm.weights.align import model_config, rules
from vlm.weights.files import SafetensorsFile
from vlm.weights.instantiate import abstract_model
from vlm.weights.processors import huggingface_preprocess
from vlm.weights.rules import flat_shapes
from vlm.weights.vocabularies import huggingface_tokenizer
from vlm.weights.writing_align import align_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
DEFAULT = {"model_type": "align", "architectures": ["AlignModel"]}


def test_the_published_model_is_efficientnet_b7():
    vision = model_config(DEFAULT, "here").vision
    assert isinstance(vision, EfficientNetConfig)
    assert [stage.depth for stage in vision.stages] == [4, 7, 7, 10, 10, 13, 4]
    assert [stage.width for stage in vision.stages] == [32, 48, 80, 160, 224, 384, 640]
    assert (vision.stem_width, vision.patch_size, vision.tokens(289)) == (64, 32, 81)


@pytest.mark.parametrize(
    ("tower", "fields", "message"),
    [
        ("vision", {"hidden_act": "gelu"}, "hidden_act is 'gelu': vlm supports swish"),
        ("vision", {"pooling_type": "sum"}, "pooling_type is 'sum': vlm supports mean, max"),
        ("vision", {"strides": [1, 2, 2, 3, 1, 2, 1]}, "strides has 3: vlm supports 1 and 2"),
        ("vision", {"kernel_sizes": [3, 3, 5, 3, 5, 4, 3]}, "kernel_sizes has 4"),
        ("vision", {"kernel_sizes": [3, 3]}, "lists of different lengths"),
        ("vision", {"kernel_sizes": "3"}, "kernel_sizes is '3', not a list"),
        (
            "vision",
            {"in_channels": [32, 16, 24, 40, 80, 112, 200]},
            r"channels are scaled to \[64",
        ),
        ("vision", {"depthwise_padding": [-1]}, "depthwise_padding is -1"),
        ("vision", {"num_block_repeats": [999] * 7}, "num_block_repeats is 3097"),
        ("vision", {"depth_coefficient": 0.0}, "must be greater than 0"),
        ("vision", {"num_channels": 1}, "images have 1 channels"),
        ("vision", {"hidden_dim": 8}, "hidden_dim 8 is the side .* 18 places"),
        ("text", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        (None, {"projection_dim": 512}, "projection_dim is 512, and the vision tower has 640"),
        (None, {"temperature_init_value": 0.0}, "temperature_init_value is 0.0"),
    ],
)
def test_invalid_config_fields_are_named(tower, fields, message):
    values = DEFAULT | ({f"{tower}_config": fields} if tower else fields)
    with pytest.raises(CheckpointError, match=message):
        model_config(values, "here")


def test_a_temperature_must_be_positive(monkeypatch):
    read = SafetensorsFile.read

    def cold(self, name, *rows):
        value = read(self, name, *rows)
        return np.asarray(-value) if name == "temperature" else value

    monkeypatch.setattr(SafetensorsFile, "read", cold)
    with pytest.raises(CheckpointError, match=r"has the temperature -0\.07.* greater than 0"):
        load(GOLDEN / "hf_align")


def test_every_option_of_its_processor_is_taken():
    golden, rows = np.load(GOLDEN / "hf_align" / "pixels.npz"), []
    outputs = np.load(GOLDEN / "hf_align" / "outputs.npz")
    raw = [outputs[f"image/{i}"] for i in range(3)]
    while f"config/{len(rows)}" in golden:
        values = json.loads(golden[f"config/{len(rows)}"].item())
        config = huggingface_preprocess(values, "here")
        assert np.abs(Preprocess(config)(raw) - golden[f"pixels/{len(rows)}"]).max() < 2e-6
        rows.append(config.resize)
    assert rows == ["squash", "crop", "squash"]
    kind = {"image_processor_type": "EfficientNetImageProcessor"}
    with pytest.raises(CheckpointError, match="resizes to 346 pixels and crops to 400"):
        huggingface_preprocess(kind | {"do_center_crop": True, "crop_size": 400}, "here")
    with pytest.raises(CheckpointError, match=r"rescale_factor is 0\.0"):
        huggingface_preprocess(kind | {"rescale_factor": 0.0}, "here")


def test_what_alignmodel_has_no_place_for_is_not_written():
    bundle = load(GOLDEN / "hf_align")
    assert isinstance(bundle.config.vision, EfficientNetConfig)
    text = bundle.config.text

    def refused(vision, message, embed_dim=24):
        config = ModelConfig(vision, text, embed_dim=embed_dim)
        with pytest.raises(CheckpointError, match=message):
            align_config(config, bundle.tokenizer)

    stage = EfficientNetStage(1, 24, halve=True)
    refused(EfficientNetConfig(32, 16, (stage,)), "AlignModel .*vision.projection 'linear'")
    # 96 / 32 is a factor of three, of which no number of channels makes 25.
    odd = EfficientNetConfig(32, 96, (EfficientNetStage(1, 25),), projection="none")
    refused(odd, r"channels \[25\] after a stem of 96", embed_dim=25)


def test_channels_are_written_as_what_is_scaled_to_them():
    bundle = load(GOLDEN / "hf_align")
    values = align_config(bundle.config, bundle.tokenizer)
    theirs = values["vision_config"]
    assert theirs["depthwise_padding"] == [4]  # the other number is of a block without a stride
    again = model_config(values, "here").vision
    assert isinstance(again, EfficientNetConfig)
    assert again == bundle.config.vision
    full = model_config(DEFAULT, "here")
    small = TextConfig(width=24, depth=1, heads=3, mlp_dim=8, norm="post", pool="first", pad_id=0)
    written = align_config(ModelConfig(full.vision, small, embed_dim=640), bundle.tokenizer)
    assert written["vision_config"]["in_channels"] == [32, 16, 24, 40, 80, 112, 192]
    assert written["vision_config"]["width_coefficient"] == 2.0
    assert model_config(written, "here").vision == full.vision


def test_every_parameter_has_a_rule():
    config = model_config(DEFAULT, "here")
    assert isinstance(config.vision, EfficientNetConfig)
    shapes = flat_shapes(abstract_model(config, np.float32))
    ours = [rule.ours for rule in rules(config.vision)]
    assert sorted(ours) == sorted(shapes)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) > 170e6


def test_a_tokenizer_that_was_in_use_is_the_same(tmp_path):
    """transformers saves the last padding and truncation with it."""
    folder = epath.Path(shutil.copytree(GOLDEN / "hf_align", tmp_path / "model"))
    config = model_config(json.loads((folder / "config.json").read_text()), "here")
    ours = huggingface_tokenizer(folder, config)
    used = ours.vocabulary
    used.enable_padding(length=64, pad_id=0, pad_token="[PAD]")
    used.enable_truncation(1)
    (folder / "tokenizer.json").write_text(used.to_str())
    again, texts = huggingface_tokenizer(folder, config), ["a photo", "", "[MASK] cat" * 40]
    assert again.config == ours.config
    assert np.array_equal(again(texts), ours(texts))


def test_a_folder_with_another_padding_or_no_bert_is_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "hf_align", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["pad_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"pads texts with token 0, .* pad_token_id 3"):
        load(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt has no \[UNK\]"):
        load(folder)
