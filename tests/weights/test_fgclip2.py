"""FG-CLIP 2: short and long texts as its authors' code embeds them, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vlm.adaptation import attach
from vlm.bundle import load
from vlm.config import AdapterConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.models import adapters
from vlm.weights.fgclip2 import model_config
from vlm.weights.processors import huggingface_preprocess
from vlm.weights.registry import describe
from vlm.weights.rules import flat_arrays

FOLDER = pathlib.Path(__file__).parent / "golden" / "hf_fgclip2"
TABLES = "text_model.embeddings.position_embedding"


@pytest.fixture(scope="module")
def golden():
    return np.load(FOLDER / "fgclip2.npz")


@pytest.fixture
def edited(tmp_path):
    """A copy of the folder whose tensors are changed, or whose `config.json` is."""

    def copy(tensors=None, config=None):
        folder = pathlib.Path(shutil.copytree(FOLDER, tmp_path / "model"))
        if tensors is not None:
            values = load_file(folder / "model.safetensors")
            tensors(values)
            save_file(values, folder / "model.safetensors")
        if config is not None:
            values = json.loads((folder / "config.json").read_text())
            config(values)
            (folder / "config.json").write_text(json.dumps(values))
        return folder

    return copy


@pytest.mark.parametrize("length", [None, 6, 23])  # its own, a part of that, and long texts
def test_each_length_is_embedded_as_by_their_code(golden, length):
    bundle, tokens = load(FOLDER, context_length=length), length or 11
    raw = [golden[f"image/{i}"] for i in range(len(golden["z_image"]))]
    texts = golden["texts"].tolist()
    assert np.array_equal(bundle.tokenizer(texts), golden[f"tokens/{tokens}"])
    z_image, z_text = bundle.encode_image(raw), bundle.encode_text(texts)
    assert np.abs(z_image - golden["z_image"]).max() < 1e-6
    assert np.abs(z_text - golden[f"z_text/{tokens}"]).max() < 1e-6
    logits = bundle.logit_scale * z_image @ z_text.T + bundle.logit_bias
    assert np.abs(logits - golden[f"logits/{tokens}"]).max() < 1e-5


def test_what_is_saved_keeps_its_way(golden, tmp_path):
    """A bundle of long texts is one again; transformers has it as a SigLIP 2 of so many tokens."""
    long = load(FOLDER, context_length=23)
    long.save(tmp_path / "long")
    long.save(tmp_path / "siglip2", format="huggingface")
    again = load(tmp_path / "long")
    texts = ["a photo of a cat", "Two DOGS!", "", "一只猫"]  # a last sigma would be another
    for other in (again, load(tmp_path / "siglip2")):
        pairs = zip(flat_arrays(long.model), flat_arrays(other.model), strict=True)
        assert all(np.array_equal(a, b) for (_, a), (_, b) in pairs)
        assert np.array_equal(long.tokenizer(texts), other.tokenizer(texts))
    assert again.tokenizer.config == long.tokenizer.config
    assert again.identity == load(FOLDER, context_length=23).identity != load(FOLDER).identity
    with pytest.raises(CheckpointError, match="none of timm's vision towers"):
        long.save(tmp_path / "open_clip", format="open_clip")


def test_an_adapter_opens_with_the_way_that_it_was_made_for(golden, tmp_path):
    long, config = load(FOLDER, context_length=23), AdapterConfig(rank=2, targets=("text.*.query",))
    long.with_adapter(adapters.fresh(long.model, config, jax.random.key(0)), config).save_adapter(
        tmp_path / "adapter"
    )
    texts = golden["texts"].tolist()
    z_text = load(tmp_path / "adapter").encode_text(texts)
    assert np.abs(z_text - golden["z_text/23"]).max() < 1e-6  # a fresh adapter changes nothing
    assert describe(tmp_path / "adapter")[0].config.text.context_length == 23
    with pytest.raises(CheckpointError, match="another model"):
        attach(load(FOLDER), tmp_path / "adapter")


def test_long_positions_are_read_in_parts_too(golden, monkeypatch):
    whole = load(FOLDER, context_length=23)
    monkeypatch.setattr("vlm.weights.files._PART", 24 * 3)  # three rows, and two tables meet at 5
    parts = load(FOLDER, context_length=23)
    assert np.array_equal(whole.model.text.position[...], parts.model.text.position[...])
    tensors = load_file(FOLDER / "model.safetensors")
    first, others = (tensors[f"{TABLES}_{end}.weight"] for end in ("ori", "res"))
    assert np.array_equal(parts.model.text.position[...], np.concatenate([first[:5], others[5:]]))


def test_long_texts_of_a_half_precision_file(edited):
    def halve(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(ml_dtypes.bfloat16)

    half, whole = (load(f, context_length=23).model for f in (edited(tensors=halve), FOLDER))
    rounded = np.asarray(whole.text.position[...]).astype(ml_dtypes.bfloat16)
    assert np.array_equal(half.text.position[...], rounded.astype(np.float32))


def test_longer_texts_than_it_has_positions_for_are_refused():
    with pytest.raises(ConfigError, match=r"context_length 24: .* for 23 tokens, .* at most 23"):
        load(FOLDER, context_length=24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("longtext_head.bias"), "missing from the file: longtext_head.bias"),
        (
            lambda t: t.pop(f"{TABLES}_res.weight"),
            "1 parameter missing from the file: .*_ori.*_res",
        ),
        (
            lambda t: t.update({f"{TABLES}_res.weight": np.zeros((22, 24), np.float32)}),
            r"of another shape: .*_res\.weight \(22, 24\) \(the model has \(23, 24\)\)",
        ),
        (
            lambda t: t.update({f"{TABLES}_ori.weight": np.zeros((23, 24), np.int8)}),
            r"has 'text_model.*_ori\.weight' as int8, as a quantized model",
        ),
        (
            lambda t: t.update({"longtext_head.weight": np.zeros((32, 24), np.float32)}),
            r"longtext_head\.weight \(32, 24\) \(the model has \(24, 24\)\)",
        ),
    ],
)
def test_only_long_texts_need_their_parameters(edited, change, message):
    folder = edited(tensors=change)
    for (name, a), (_, b) in zip(
        flat_arrays(load(FOLDER).model), flat_arrays(load(folder).model), strict=True
    ):
        assert np.array_equal(a, b), name
    with pytest.raises(CheckpointError, match=message):
        load(folder, context_length=23)


@pytest.mark.parametrize("name", ["dense_feature_head.mlp.fc3.weight", "boxtext_head.scale"])
def test_no_other_name_is_passed_over(edited, name):
    folder = edited(tensors=lambda t: t.update({name: np.zeros(3, np.float32)}))
    for length in (None, 23):
        with pytest.raises(CheckpointError, match=f"without a place in the model: {name}"):
            load(folder, context_length=length)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("text", {"hidden_size": 28}, r"projection_size is 24 .* hidden_size, 28: they must be eq"),
        ("text", {"projection_size": 28}, "its width 24 must equal embed_dim 28"),
        ("text", {"longtext_len": 11}, r"longtext_len is 11, and short texts have 11 tokens"),
        ("text", {"keep_len": 2.5}, r"keep_len is 2\.5, not a whole number"),
        ("text", {"hidden_act": "swish"}, "hidden_act is 'swish'"),
        ("vision", {"num_patches": 26}, "num_patches 26 is not a square"),
        ("vision", {"vision_use_head": False}, "without a head"),
        (None, {"architectures": ["Fgclip2TextModel"]}, "describes a 'Fgclip2TextModel'"),
    ],
)
def test_invalid_config_fields_are_named(edited, part, fields, message):
    folder = edited(config=lambda v: (v[f"{part}_config"] if part else v).update(fields))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(folder)


def test_the_published_sizes():
    text = {"vocab_size": 256_000, "hidden_size": 768}
    config = model_config({"model_type": "fgclip2", "text_config": text}, "here")
    assert (config.text.context_length, config.vision.max_patches, config.embed_dim) == (
        64,
        256,
        768,
    )


def test_patches_that_depend_on_the_batch_are_refused():
    """Their own processor does so unless it is told not to; the published files name another."""
    values = {"image_processor_type": "Fgclip2ImageProcessor", "patch_size": 6}
    with pytest.raises(CheckpointError, match=r"has dynamic_max_patches, .* set it to false"):
        huggingface_preprocess(values, "here", 30)
    values |= {"dynamic_max_patches": False, "max_num_patches": 31}
    config = huggingface_preprocess(values, "here", 30)
    published = json.loads((FOLDER / "preprocessor_config.json").read_text())
    named = huggingface_preprocess(published, "there", 30)
    assert config == dataclasses.replace(named, backend="pillow")
