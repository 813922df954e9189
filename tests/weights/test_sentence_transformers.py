"""Folders of sentence-transformers, against its own outputs: make_sentence_transformers.py."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import vlm
from vlm.errors import CheckpointError, ConfigError
from vlm.weights.writing_tokenizer import standalone

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["st_distilbert", "st_bert"])
def test_texts_embed_as_theirs(name):
    golden = np.load(GOLDEN / name / "text.npz")
    model = vlm.load(GOLDEN / name)
    z = golden["z_text"] / np.linalg.norm(golden["z_text"], axis=-1, keepdims=True)
    assert np.abs(model.encode_text(golden["texts"].tolist()) - z).max() < 3e-6
    with pytest.raises(ConfigError, match="has no vision tower and embeds texts alone"):
        model.encode_image(np.zeros((8, 8, 3), np.uint8))


def clip_in_a_folder(tmp_path, *more, path="0_CLIPModel"):
    """CLIP as clip-ViT-B-32 has it: in a folder of its own."""
    folder = tmp_path / "st-clip"
    shutil.copytree(GOLDEN / "hf_clip", folder / path)
    modules = [{"idx": 0, "path": path, "type": "sentence_transformers.models.CLIPModel"}, *more]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_clip_in_a_folder_of_its_own(tmp_path):
    normalize = {"idx": 1, "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"}
    model, same = vlm.load(clip_in_a_folder(tmp_path, normalize)), vlm.load(GOLDEN / "hf_clip")
    texts = ["a photo of a cat", "two dogs"]
    assert np.array_equal(model.encode_text(texts), same.encode_text(texts))
    assert model.name == "st-clip"


def test_modules_after_a_dual_encoder_are_refused(tmp_path):
    dense = {"idx": 1, "path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    with pytest.raises(CheckpointError, match="has Dense after a dual encoder"):
        vlm.load(clip_in_a_folder(tmp_path, dense))


@pytest.mark.parametrize("path", ["../hf_clip", "/etc", "a/b"])
def test_modules_outside_the_folder_are_refused(path, tmp_path):
    folder = clip_in_a_folder(tmp_path)
    modules = [{"path": path, "type": "CLIPModel"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="not a folder beside it"):
        vlm.load(folder)


@pytest.mark.parametrize("modules", [{}, [], [3], [{"type": 3}]])
def test_other_lists_of_modules_are_refused(modules, tmp_path):
    folder = clip_in_a_folder(tmp_path)
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        vlm.load(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling_mode is 'lasttoken'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Tanh"}, "activation_function"),
        ("2_Dense/config.json", {"in_features": 8}, "in_features 8"),
        ("2_Dense/config.json", {"out_features": 8}, "of another shape"),
        ("config.json", {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds is True"),
        ("config.json", {"n_layers": 1}, "without a place in the model"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt false"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "query: "}, "default_prompt_name": "passage"},
            "default_prompt_name is 'passage'",
        ),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts.query is 3"),
        ("config_sentence_transformers.json", {"prompts": "query: "}, "prompts is 'query: '"),
    ],
)
def test_options_that_differ_are_refused_by_name(file, changes, message, tmp_path):
    folder = shutil.copytree(GOLDEN / "st_distilbert", tmp_path / "st")
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))
    with pytest.raises(CheckpointError, match=message):
        vlm.load(folder)


def with_prompts(tmp_path, default):
    folder = shutil.copytree(GOLDEN / "st_bert", tmp_path / "st")
    prompts = {"prompts": {"query": "two dogs: ", "passage": "", "cat": "a Cat "}}
    prompts["default_prompt_name"] = default
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return vlm.load(folder)


def test_prompts_are_chosen_by_name(tmp_path):
    model, texts = with_prompts(tmp_path, None), ["a photo of a cat", ""]
    prompted = model.encode_text([f"two dogs: {text}" for text in texts])
    assert model.prompts == {"query": "two dogs: ", "passage": "", "cat": "a Cat "}
    assert "query ('two dogs: ')" in repr(model)
    assert np.array_equal(model.encode_text(texts, prompt="query"), prompted)
    plain = model.encode_text(texts)
    assert np.array_equal(model.encode_text(texts, prompt="passage"), plain)
    assert not np.array_equal(plain, prompted)
    query = model.with_prompt("query")
    assert np.array_equal(query.encode_text(texts), prompted)
    assert np.array_equal(query.encode_text(texts, prompt=""), plain)
    assert np.array_equal(model.encode_text(texts), plain)
    query.save(tmp_path / "bundle")
    again = vlm.load(tmp_path / "bundle")
    assert np.array_equal(again.encode_text(texts), prompted)
    assert again.prompts == model.prompts
    with pytest.raises(ConfigError, match="'search' is unknown: it has 'query', 'passage', 'cat'"):
        model.encode_text(texts, prompt="search")
    with pytest.raises(ConfigError, match="the model has no prompts"):
        vlm.load(GOLDEN / "hf_clip").with_prompt("query")


def test_an_index_of_documents_is_searched_with_the_prompt_of_queries(tmp_path):
    model = with_prompts(tmp_path, None)
    index = vlm.RetrievalIndex(model)
    texts = ["a photo of a cat", "two dogs: a red car", "a red car"]
    index.add(texts)
    index.save(tmp_path / "index")
    asked = vlm.RetrievalIndex.load(tmp_path / "index", model.with_prompt("query"))
    assert asked.mismatch is None
    assert asked.search("a red car", k=1)[0].id == 1
    assert index.search("a red car", k=1)[0].id == 2


def test_a_default_prompt_is_applied_as_theirs(tmp_path):
    model, texts = with_prompts(tmp_path, "query"), ["a photo of a cat"]
    prompted = model.encode_text(["two dogs: a photo of a cat"], prompt="")
    assert np.array_equal(model.encode_text(texts), prompted)
    with pytest.raises(CheckpointError, match="no place for the default prompt 'two dogs: '"):
        standalone(model.tokenizer)


def test_older_settings_are_read(tmp_path):
    folder = shutil.copytree(GOLDEN / "st_distilbert", tmp_path / "st")
    older = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(older))
    options = {"max_seq_length": 7, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(options))
    model = vlm.load(folder)
    assert model.config.text_transformer.pool == "mean"
    assert model.tokenizer.config.context_length == 7
    both = older | {"pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(both))
    with pytest.raises(CheckpointError, match="has the poolings"):
        vlm.load(folder)


def test_a_missing_dense_is_named(tmp_path):
    folder = shutil.copytree(GOLDEN / "st_distilbert", tmp_path / "st")
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2_Dense has no model\.safetensors"):
        vlm.load(folder)
