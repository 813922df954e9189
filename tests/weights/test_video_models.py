"""Video models, against outputs of their own code: make_videos.py."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import vlm
from vlm.errors import CheckpointError, ConfigError
from vlm.heads import VideoEncoder
from vlm.serving import Batched

GOLDEN = pathlib.Path(__file__).parent / "golden"
PRISM = "video_videoprism"
MODELS = sorted(path.parent.name for path in GOLDEN.glob("video_*/video.npz"))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return vlm.load(GOLDEN / request.param), np.load(GOLDEN / request.param / "video.npz")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def raw(golden):
    return [golden[f"video/{i}"] for i in range(len(golden["pixels"]))]


def test_towers_compute_what_theirs_do(case):
    model, golden = case
    z_video = np.asarray(model.model.encode_image(jnp.asarray(golden["pixels"])))
    z_text = np.asarray(model.model.encode_text(jnp.asarray(golden["tokens"])))
    assert np.abs(z_video - unit(golden["z_video"])).max() < 3e-6
    assert np.abs(z_text - unit(golden["z_text"])).max() < 3e-6


def test_end_to_end(case):
    model, golden = case
    videos, texts = raw(golden), golden["texts"].tolist()
    for video, pixels in zip(videos, golden["pixels"], strict=True):
        assert np.abs(model.preprocess(video) - pixels).max() < 1e-6
    assert np.array_equal(model.tokenizer(texts), golden["tokens"])
    z = model.encode_video(videos)
    assert np.abs(z - unit(golden["z_video"])).max() < 5e-6
    assert np.abs(model.encode_video(videos, 1) - z).max() < 1e-6
    assert np.abs(model.encode_text(texts) - unit(golden["z_text"])).max() < 3e-6
    logits = model.video_logits(videos, texts)
    assert np.abs(logits - golden["logits"]).max() < 3e-5
    assert np.abs(model.video_logits(videos[1], texts, batch_size=1) - logits[1:]).max() < 1e-5
    assert model.video_logits([], texts).shape == (0, len(texts))


def test_models_are_written_back(case, tmp_path):
    model, golden = case
    videos, texts = raw(golden), golden["texts"].tolist()
    for form in ("huggingface", "vlm"):
        model.save(tmp_path / form, format=form)
        again = vlm.load(tmp_path / form)
        assert again.config == model.config
        assert again.preprocess.config == model.preprocess.config
        assert np.array_equal(again.video_logits(videos, texts), model.video_logits(videos, texts))


def test_what_needs_images_says_so(case, tmp_path):
    model, golden = case
    frame, frames = raw(golden)[0][0], model.config.vision.video_frames
    with pytest.raises(ConfigError, match=f"embeds videos of {frames} frames, not images: use enc"):
        model.encode_image(frame)
    with pytest.raises(ConfigError, match=f"takes videos of {frames} frames: give {frames}"):
        model.encode_video([frame], frames=3)
    with pytest.raises(ConfigError, match="takes videos, and an exported program takes images"):
        vlm.export(model, tmp_path / "program")
    with pytest.raises(ConfigError, match=f"embeds videos of {frames} frames, not images"):
        Batched(model)
    with pytest.raises(ConfigError, match="takes videos, and vlm trains on images"):
        vlm.Experiment(model=model.config)
    with pytest.raises(ConfigError, match=r"a tower of videos takes only 3[26] pixels"):
        vlm.load(GOLDEN / model.name, image_size=64)


def test_short_videos_repeat_frames(case):
    model, golden = case
    one = raw(golden)[0][:1]
    many = np.repeat(one, model.config.vision.video_frames, axis=0)
    assert np.array_equal(model.encode_video(one), model.encode_video(many))


def test_text_prompts_of_xclip_depend_on_the_video(tmp_path):
    model = vlm.load(GOLDEN / "video_xclip")
    clips = raw(np.load(GOLDEN / "video_xclip" / "video.npz"))
    with pytest.raises(ConfigError, match=r"with Bundle\.video_logits\(videos, texts\)"):
        vlm.ZeroShotClassifier(VideoEncoder(model), ["a", "b"])
    probe = vlm.FewShotClassifier.fit(VideoEncoder(model), clips, ["a", "b"])
    assert [row[0][0] for row in probe(iter(clips)).top(1)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("video_xclip", None, {"projection_dim": 12}, "mit_hidden_size is 24, and projection_dim"),
        ("video_xclip", None, {"prompt_hidden_act": "gelu"}, "prompt_hidden_act is 'gelu', and"),
        ("video_xclip", "text_config", {"layer_norm_eps": 1e-6}, "text_config.layer_norm_eps is"),
        (
            "video_xclip",
            "vision_config",
            {"hidden_act": "relu"},
            "prompt_hidden_act is 'quick",
        ),
        ("video_xclip", None, {"prompt_layers": 3}, "missing from the file"),
        ("video_xclip", None, {"prompt_num_attention_heads": 5}, "prompt_heads 5 does not divide"),
        ("video_xclip", "vision_config", {"num_frames": 8}, "of another shape"),
        (PRISM, None, {"architectures": ["VideoPrismVideoModel"]}, "vlm reads VideoPrismClipModel"),
        (PRISM, "vision_config", {"tubelet_size": [2, 9, 9]}, r"tubelet_size is \[2, 9, 9\]: vlm"),
        (PRISM, "vision_config", {"tubelet_size": [1, 9, 6]}, "tubelet_size is 9: vlm supports 6"),
        (PRISM, "vision_config", {"qkv_bias": False}, "qkv_bias is False: vlm supports True"),
        (PRISM, "text_config", {"apply_l2norm": False}, "apply_l2norm is False: vlm supports True"),
        (PRISM, "text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu': vlm supports relu"),
        (PRISM, "vision_config", {"num_frames": 8}, "of another shape"),
    ],
)
def test_configs_that_differ_are_refused_by_name(name, part, changes, message, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values).update(changes)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        vlm.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_processor_type": "Qwen2VLVideoProcessor"}, "video_processor_type is 'Qwen2VL"),
        ({"fps": 2}, "fps is 2: vlm samples num_frames"),
        ({"do_center_crop": True, "crop_size": {"height": 40, "width": 40}}, "crops to 40"),
        ({"do_rescale": False}, "turns do_rescale off"),
    ],
)
def test_processors_that_differ_are_refused_by_name(changes, message, tmp_path):
    folder = shutil.copytree(GOLDEN / PRISM, tmp_path / PRISM)
    values = json.loads((folder / "processor_config.json").read_text())
    values["video_processor"].update(changes)
    (folder / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        vlm.load(folder)
    (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no video_preprocessor_config\.json"):
        vlm.load(folder)


@pytest.mark.parametrize("kind", ["clap", "pe_audio", "pe_audio_video", "pe_video"])
def test_models_of_sound_are_refused_with_the_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        CheckpointError, match=rf"the type {kind}, (which embeds sound|the video half)"
    ):
        vlm.load(tmp_path)
