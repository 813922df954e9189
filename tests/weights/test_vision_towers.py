"""Checkpoints with one tower, against outputs of their own code: make_vision_towers.py."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from seeded import seeded

import vlm
from vlm.errors import CheckpointError, ConfigError
from vlm.heads import FewShotClassifier

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOWERS = sorted(path.parent.name for path in GOLDEN.glob("one_*/image.npz"))


def folder_of(name, tmp_path):
    """The folder of a tower; timm's weights are made here."""
    shapes = GOLDEN / name / "shapes.json"
    if not shapes.exists():
        return GOLDEN / name
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    tensors = {key: seeded(key, tuple(s)) for key, s in json.loads(shapes.read_text()).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", TOWERS)
def test_towers_embed_as_theirs_and_are_written_back(name, tmp_path):
    golden = np.load(GOLDEN / name / "image.npz")
    model = vlm.load(folder_of(name, tmp_path))
    pixels, raw = golden["pixels"], [golden[f"image/{i}"] for i in range(3)]
    z = np.asarray(model.model.encode_image(jnp.asarray(pixels)))
    assert np.abs(z - unit(golden["z_image"])).max() < 3e-6
    # DINOv3's processor does not round resized pixels to 8 bits.
    close = 1.01 / 255 / 0.224 if "dinov3" in name else 1e-6
    assert np.abs(model.preprocess(raw) - pixels).max() < close
    check = model.save(tmp_path / "back", format="huggingface")
    assert check is not None
    assert check.texts == 0
    again = vlm.load(tmp_path / "back")
    assert np.array_equal(np.asarray(again.model.encode_image(jnp.asarray(pixels))), z)


def test_text_towers_embed_as_theirs():
    golden = np.load(GOLDEN / "one_clip_text" / "text.npz")
    model = vlm.load(GOLDEN / "one_clip_text")
    z = np.asarray(model.model.encode_text(jnp.asarray(golden["tokens"])))
    assert np.abs(z - unit(golden["z_text"])).max() < 3e-6
    with pytest.raises(ConfigError, match="image_size 8: the model has no vision tower"):
        vlm.load(GOLDEN / "one_clip_text", image_size=8)
    with pytest.raises(ConfigError, match="has no vision tower and embeds texts alone"):
        model.encode_image(np.zeros((8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def dinov2():
    return vlm.load(GOLDEN / "one_dinov2")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (8, 40, 40, 3)).astype(np.uint8)
    noise[::2, ..., 0] += 180
    return list(noise)


def test_images_are_searched_and_classified_without_texts(dinov2, pictures, tmp_path):
    index = vlm.RetrievalIndex(dinov2)
    index.add(pictures, ids=[f"{i}" for i in range(8)])
    index.save(tmp_path / "index")
    loaded = vlm.RetrievalIndex.load(tmp_path / "index", dinov2)
    assert loaded.search(pictures[2], k=1)[0].id == "2"
    with pytest.raises(CheckpointError, match="was built by the model 'one_dinov2'"):
        vlm.RetrievalIndex.load(tmp_path / "index", vlm.load(GOLDEN / "hf_clip"))
    probe = FewShotClassifier.fit(dinov2, pictures, ["red", "dark"] * 4)
    assert probe(pictures[:2]).top(1)[0][0][0] == "red"


def test_bundles_with_one_tower_are_saved(dinov2, pictures, tmp_path):
    dinov2.save(tmp_path / "bundle")
    again = vlm.load(tmp_path / "bundle")
    assert np.array_equal(again.encode_image(pictures), dinov2.encode_image(pictures))
    assert "text no tower" in repr(again)


def test_messages_tell_what_is_missing(dinov2, tmp_path):
    alone = "one_dinov2 has no text tower and embeds images alone: fit a FewShotClassifier"
    for use in (lambda: dinov2.encode_text("a"), lambda: vlm.ZeroShotClassifier(dinov2, ["a"])):
        with pytest.raises(ConfigError, match=alone):
            use()
    with pytest.raises(ConfigError, match="the model has no text tower"):
        vlm.load(GOLDEN / "one_dinov2", tower="text")
    with pytest.raises(ConfigError, match="context_length 5: the model has no text tower"):
        vlm.load(GOLDEN / "one_dinov2", context_length=5)
    with pytest.raises(ConfigError, match="no text tower, which this needs"):
        dinov2.save(tmp_path / "x", format="open_clip")
    with pytest.raises(ConfigError, match="neither a vision nor a text tower"):
        vlm.ModelConfig(vlm.config.NoVisionConfig(), vlm.config.NoTextConfig())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("one_vit", {"pooler_act": "relu"}, "pooler_act is 'relu'"),
        ("one_vit", {"num_channels": 1}, "1 channels"),
        ("one_vit", {"hidden_act": "selu"}, "hidden_act is 'selu'"),
        ("one_vit", {"hidden_size": 25}, "25"),
        ("one_dinov2", {"mlp_ratio": -1}, "mlp_ratio is -1"),
        ("one_dinov2", {"image_size": 48}, "of another shape: embeddings.position_embeddings"),
        ("one_dinov2_registers", {"num_register_tokens": 3}, "register_tokens"),
        ("one_dinov3", {"mlp_bias": False}, "mlp_bias is False"),
        ("one_dinov3", {"num_attention_heads": 12}, "multiple of 4"),
        ("one_dinov3", {"use_gated_mlp": True}, "hidden_act is 'gelu'"),
        (
            "one_internvl",
            {"use_absolute_position_embeddings": False},
            "use_absolute_position_embeddings is False: vlm supports True",
        ),
        ("one_internvl", {"use_qk_norm": True}, r"missing from the file: .*q_norm\.weight"),
        ("one_internvl_qk_norm", {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05: vlm supports"),
        ("one_internvl", {"image_size": [32, 40]}, "vlm supports only squares"),
        ("one_internvl", {"norm_type": "batch_norm"}, "norm_type is 'batch_norm'"),
        ("one_internvl", {"use_mean_pooling": False}, "its last norm is of another kind"),
        ("one_internvl", {"attention_bias": True}, r"missing from the file: .*q_proj\.bias"),
        ("one_dinov3_gated", {"query_bias": True}, "missing from the file"),
        ("one_timm", {"architecture": "resnet50"}, "architecture is 'resnet50'"),
        ("one_timm", {"architecture": "vit_huge_patch14_224"}, "another shape|not those of timm's"),
        ("one_timm", {"global_pool": "max", "model_args": None}, "global_pool is 'max'"),
        ("one_timm", {"model_args": {"qk_norm": True}}, "model_args has qk_norm True"),
        ("one_timm", {"model_args": {"img_size": 48}}, "img_size is 48"),
    ],
)
def test_configs_that_differ_are_refused_by_name(name, changes, message, tmp_path):
    folder = folder_of(name, tmp_path)
    if folder.parent == GOLDEN:
        folder = shutil.copytree(folder, tmp_path / name)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        vlm.load(folder)


def test_files_that_differ_are_refused_by_name(tmp_path):
    folder = shutil.copytree(GOLDEN / "one_vit", tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"embeddings.extra": np.zeros(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"without a place in the model: embeddings\.extra"):
        vlm.load(folder)
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing from the file: layernorm\.weight"):
        vlm.load(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no preprocessor_config"):
        vlm.load(folder)


def test_training_and_distillation_need_both_towers(tmp_path):
    from vlm.training.init_from import resolve
    from vlm.training.teacher import DescribedTeacher

    with pytest.raises(ConfigError, match="the model has no text tower, and contrastive training"):
        resolve(vlm.Experiment(init_from=str(GOLDEN / "one_dinov2")))
    experiment = vlm.Experiment(distill=vlm.config.DistillConfig(str(GOLDEN / "one_dinov2")))
    with pytest.raises(ConfigError, match="one_dinov2 has no text tower"):
        DescribedTeacher(resolve(experiment))
