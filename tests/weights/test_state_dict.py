"""Files of weights alone, opened by the name of their architecture."""

import dataclasses
import json
import logging
import pathlib
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from seeded import seeded

from vlm.bundle import load
from vlm.cli.convert import convert
from vlm.config import TextConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.models import recipes, variants
from vlm.models.dual_encoder import DualEncoder
from vlm.weights import encoders, open_clip, state_dict, text_encoders, timm_folders, timm_towers
from vlm.weights.files import write_safetensors
from vlm.weights.rules import flat_arrays

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def small(monkeypatch):
    """Name the small golden model as if it were of open_clip."""
    about = json.loads((GOLDEN / "oc_vit" / "open_clip_config.json").read_text())
    known = {"ViT-S-7": about["model_cfg"], "ViT-B-32": state_dict.architectures()["ViT-B-32"]}
    monkeypatch.setattr(state_dict, "architectures", lambda: known)
    return GOLDEN / "oc_vit" / "open_clip_model.safetensors"


def test_an_architecture_by_name_is_the_same_model(small, caplog, tmp_path):
    golden = np.load(GOLDEN / "oc_vit" / "outputs.npz")
    raw = [golden[f"image/{i}"] for i in range(len(golden["pixels"]))]
    with caplog.at_level(logging.INFO, "vlm"):
        bundle = load(small, architecture="vit_s/7")
    assert "no preprocessing of its own" in caplog.text
    assert np.abs(bundle.encode_image(raw) - golden["z_image"]).max() < 3e-6
    assert np.abs(bundle.encode_text(golden["texts"].tolist()) - golden["z_text"]).max() < 3e-6
    assert bundle.source is None  # its path alone does not open it again
    convert(str(small), str(tmp_path / "bundle"), architecture="ViT-S-7")
    assert np.array_equal(load(tmp_path / "bundle").encode_image(raw), bundle.encode_image(raw))


def test_what_does_not_fit_is_refused(small, tmp_path):
    with pytest.raises(CheckpointError, match=r"does not fit the architecture .*another shape"):
        load(small, architecture="ViT-B-32")
    with pytest.raises(ConfigError, match="an architecture 'ViT-B-31': choose ViT-B-32"):
        load(small, architecture="ViT-B-31")
    with pytest.raises(CheckpointError, match="'ViT-S-7' is for a file of weights"):
        load(small.parent, architecture="ViT-S-7")
    with pytest.raises(CheckpointError, match="'ViT-S-7' is for a file of weights"):
        load(tmp_path / "none.pt", architecture="ViT-S-7")
    with pytest.raises(CheckpointError, match=r"file of OpenAI's.* leave architecture 'ViT-S-7'"):
        load(GOLDEN / "openai_vit.pt", architecture="ViT-S-7")
    attack = tmp_path / "attack.pt"
    attack.write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match="no zip archive"):
        load(attack, architecture="ViT-S-7")


def test_every_name_is_found():
    names = list(state_dict.architectures())
    assert len(names) == 158  # the image-text architectures of open_clip's main branch
    assert [state_dict.find_architecture(name.lower()) for name in names] == names


def test_a_vision_tower_of_timm_by_name(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "one_timm", folder)
    about = json.loads((folder / "config.json").read_text())
    shapes = json.loads((folder / "shapes.json").read_text())
    tensors = [(name, seeded(name, tuple(shape))) for name, shape in shapes.items()]
    write_safetensors(folder / "model.safetensors", tensors, {})
    bundle = load(folder / "model.safetensors", architecture=about["architecture"])
    assert bundle.config.text.kind == "none"
    assert bundle.config == load(folder).config
    assert bundle.preprocess.config == load(folder).preprocess.config  # crops 0.9, mean 0.5
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    theirs = load(folder).model.encode_image(pixels)
    assert np.array_equal(bundle.model.encode_image(pixels), theirs)
    with pytest.raises(ConfigError, match="choose vit_base_patch16_224"):
        load(folder / "model.safetensors", architecture="vit_bas_patch16_224")
    with pytest.raises(CheckpointError, match="not those of timm's vit_large_patch14_224"):
        load(folder / "model.safetensors", architecture="vit_large_patch14_224")


def test_the_preprocessing_of_a_name_of_timms():
    read = timm_folders.named_preprocess
    half, clip = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073]
    assert read("vit_small_patch32_384", "x") == {
        "crop_pct": 1.0, "mean": half, "std": half, "crop_mode": "center"
    }  # fmt: skip
    assert read("vit_base_patch16_clip_224.openai", "x")["mean"] == clip
    assert read("vit_base_patch14_dinov2", "x")["mean"] == [0.485, 0.456, 0.406]
    with pytest.raises(CheckpointError, match=r"by the tag.*vit_base_patch16_224\.mae"):
        read("vit_base_patch16_224", "x")
    with pytest.raises(CheckpointError, match=r"has no tag 'mine': choose augreg2"):
        read("vit_base_patch16_224.mine", "x")
    with pytest.raises(CheckpointError, match="no preprocessing of timm's vit_base_patch99_224"):
        read("vit_base_patch99_224", "x")


def test_a_recipe_of_ours_by_name(tmp_path, monkeypatch):
    small = dataclasses.replace(
        recipes.clip("B/16")["model"],
        vision=variants.vision("B/16", **SMALL, projection="linear", pool="class"),
        text=TextConfig(**SMALL, vocab_size=49_408, context_length=77, causal=True, pool="argmax"),
        embed_dim=8,
    )
    monkeypatch.setattr(variants, "clip", lambda name, **changes: small)
    model = DualEncoder(small, rngs=nnx.Rngs(0))
    write_safetensors(tmp_path / "mine.safetensors", flat_arrays(model), {})
    bundle = load(tmp_path / "mine.safetensors", architecture="clip_b/16")
    tokens = jnp.asarray(bundle.tokenizer(["a cat"]))
    assert np.array_equal(bundle.model.encode_text(tokens), model.encode_text(tokens))
    with pytest.raises(CheckpointError, match=r"no vocabulary of SigLIP's: put its tokenizer.json"):
        load(tmp_path / "mine.safetensors", architecture="siglip-B/16")


SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 16}


# NaFlex towers that have no public weights, open_clip's own text tower with a vocabulary of
# tiktoken's, captioners without a text tower, and relative positions.
REFUSED = {
    "naflex_ViT-B-16", "naflex_ViT-B-32",
    "moderntext-naflex_ViT-B-16", "moderntext-naflex_ViT-B-32",
    "moderntext-naflex_ViT-B-deep-16", "moderntext-naflex_ViT-SO150M2-16",
    "moderntext-ViT-B-32-256", "naflexgenlip_b16", "naflexgenlip_so150m2", "naflexgenlip_so16",
    "naflexgenlip_test", "vit_relpos_medium_patch16_cls_224",
}  # fmt: skip


def check_towers(name, values):
    """Raise the error that reading raises before it looks at the shapes of tensors."""
    vision, text = open_clip.tower_fields(values, name)
    native = dict(values)
    if vision["timm_model_name"]:
        ends = vision["timm_pool"], vision["timm_proj"]
        timm_towers.find_family(vision["timm_model_name"], *ends, name)
        native["vision_cfg"] = {}
    if text["hf_model_name"]:
        known = encoders.recognises(text["hf_model_name"], {})
        (encoders if known else text_encoders).described(text, name, {})
        native["text_cfg"] = {}
    open_clip.model_config(native, {}, name)


def test_the_architectures_that_are_not_read():
    refused = {}
    for name, values in state_dict.architectures().items():
        try:
            check_towers(name, values)
        except CheckpointError as error:
            refused[name] = str(error)
    assert set(refused) == REFUSED
    assert all(message.startswith(name) for name, message in refused.items())
