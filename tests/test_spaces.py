"""Joined towers and truncated embeddings."""

import pathlib

import numpy as np
import pytest

import vlm
from vlm.cli import main
from vlm.errors import ConfigError

GOLDEN = pathlib.Path(__file__).parent / "weights" / "golden"
TEXTS = ["a photo of a cat", "two dogs"]
IMAGE = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)


def load(name, **options):
    return vlm.load(GOLDEN / name, **options)


def test_each_tower_of_a_joined_model_embeds_as_alone(tmp_path):
    images, texts = load("one_dinov2"), load("st_nomic")
    model = images.with_text(texts)
    assert np.array_equal(model.encode_image(IMAGE), images.encode_image(IMAGE))
    asked = model.encode_text(TEXTS, prompt="search_query")
    assert np.array_equal(asked, texts.encode_text(TEXTS, prompt="search_query"))
    assert model.name == "one_dinov2 with st_nomic"
    model.save(tmp_path / "joined")
    again = vlm.load(tmp_path / "joined")
    assert np.array_equal(again.encode_image(IMAGE), model.encode_image(IMAGE))
    assert np.array_equal(again.with_prompt("search_query").encode_text(TEXTS), asked)
    assert again.prompts == texts.prompts
    classifier = vlm.ZeroShotClassifier(again, ["cat", "dog"])
    assert classifier.logits(again.encode_image(IMAGE)).shape == (1, 2)
    half = vlm.load(tmp_path / "joined", tower="text")
    assert np.array_equal(half.encode_text(TEXTS, prompt="search_query"), asked)


def test_halves_of_dual_encoders_are_joined_too():
    whole = load("hf_jina_v2")
    images, texts = load("hf_jina_v2", tower="vision"), load("hf_jina_v2", tower="text")
    joined = images.with_text(texts)
    assert np.array_equal(joined.encode_text(TEXTS), whole.encode_text(TEXTS))
    assert joined.logit_scale == whole.logit_scale
    assert joined.config == whole.config


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (
            "nomic_vision",
            "st_nomic",
            "nomic_vision embeds images in 16 dimensions and st_nomic",
        ),
        ("st_nomic", "st_nomic", "st_nomic has no vision tower"),
        ("one_dinov2", "one_dinov2", "one_dinov2 has no text tower"),
    ],
)
def test_what_does_not_fit_is_refused(images, texts, message):
    with pytest.raises(ConfigError, match=message):
        load(images).with_text(load(texts))


def test_truncated_embeddings_are_normalised_again(tmp_path, caplog):
    model = load("hf_jina_v2")
    small = model.with_dimensions(8)
    assert not caplog.text  # its files list 8
    for whole, cut in (
        (model.encode_text(TEXTS), small.encode_text(TEXTS)),
        (model.encode_image(IMAGE), small.encode_image(IMAGE)),
    ):
        first = whole[:, :8]
        first = first / np.linalg.norm(first, axis=1, keepdims=True)
        assert np.abs(cut - first).max() < 2e-7
    assert small.embed_dim == small.config.embed_dim == 8
    assert [z.shape[1] for z in vlm.heads.text_tokens(small, TEXTS)] == [8, 8]
    small.save(tmp_path / "small")
    again = vlm.load(tmp_path / "small")
    assert np.array_equal(again.encode_text(TEXTS), small.encode_text(TEXTS))
    back = again.with_dimensions(24)
    assert np.array_equal(back.encode_text(TEXTS), model.encode_text(TEXTS))
    assert back.config == model.config
    with pytest.raises(ConfigError, match="in 8 of 24 dimensions and hf_jina_v1 texts in 24"):
        small.with_text(load("hf_jina_v1"))


def test_a_size_that_the_files_do_not_list_is_warned_of(caplog):
    load("hf_jina_v2").with_dimensions(9)
    assert "truncated to 9 dimensions, and its files list 8, 16, 24 that it was" in caplog.text
    load("hf_jina_v1").with_dimensions(8)
    assert "truncated to 8 dimensions, and its files list no size that it was" in caplog.text
    for wrong in (0, 25):
        with pytest.raises(ConfigError, match=f"dimensions {wrong}: hf_jina_v1 has 24"):
            load("hf_jina_v1").with_dimensions(wrong)


def test_truncated_embeddings_have_no_place_in_other_formats(tmp_path):
    with pytest.raises(vlm.CheckpointError, match="truncated to 8 dimensions: save the model as a"):
        load("hf_clip").with_dimensions(8).save(tmp_path / "x", format="huggingface")


def test_commands_take_a_joined_bundle(tmp_path, capsys):
    out = tmp_path / "joined"
    names = [str(GOLDEN / name) for name in ("one_dinov2", "st_nomic")]
    main(["convert", names[0], str(out), "--text", names[1], "--dimensions", "8"])
    capsys.readouterr()
    model = vlm.load(out)
    assert model.encode_image(IMAGE).shape == model.encode_text("x").shape == (1, 8)
