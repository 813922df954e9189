"""LiT with a BERT: big_vision's `.npz` with the names of flaxformer, and its WordPiece."""

import dataclasses
import math
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath

from vlm.bundle import Bundle, load
from vlm.config import ModelConfig, TextConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.inputs.preprocess import Preprocess
from vlm.weights import big_vision
from vlm.weights.instantiate import abstract_model
from vlm.weights.rules import expand, flat_shapes
from vlm.weights.vocabularies import bert_tokenizer
from vlm.weights.writing_huggingface import huggingface_config
from vlm.weights.writing_open_clip import open_clip_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
LIT = GOLDEN / "bv_lit"
ENCODER = "txt/BertEncoder_0"
LAYER = f"{ENCODER}/encoder_block/layer_sequence/layers_0"


@pytest.fixture(autouse=True)
def _heads_of_the_small_model(monkeypatch):
    monkeypatch.setitem(big_vision.BERT_HEADS, (15, 3), 3)


@pytest.fixture
def folder(tmp_path):
    for file in ("model.npz", "model.txt"):
        shutil.copy(LIT / file, tmp_path)
    return tmp_path


def test_towers_compute_what_theirs_do():
    bundle, golden = load(LIT / "model.npz"), np.load(LIT / "expected.npz")
    z_image = np.asarray(bundle.model.encode_image(jnp.asarray(golden["pixels"])))
    z_text = np.asarray(bundle.model.encode_text(jnp.asarray(golden["tokens"][:, :16])))
    assert np.abs(z_image - golden["z_image"]).max() < 2e-6
    assert np.abs(z_text - golden["z_short"]).max() < 2e-6
    assert np.abs(bundle.logit_scale * z_image @ z_text.T - golden["logits"]).max() < 2e-5
    assert bundle.loss == "softmax"
    assert bundle.config.text.context_length == bundle.tokenizer.config.context_length == 16


def test_longer_texts_as_far_as_there_are_positions():
    golden = np.load(LIT / "expected.npz")
    bundle = load(LIT / "model.npz", context_length=21)
    z_text = np.asarray(bundle.model.encode_text(jnp.asarray(golden["tokens"])))
    assert np.abs(z_text - golden["z_text"]).max() < 2e-6
    assert bundle.tokenizer("cat").shape == (1, 21)
    with pytest.raises(ConfigError, match="positions for 21 tokens"):
        load(LIT / "model.npz", context_length=22)


def test_there_and_back_as_a_bundle_alone(tmp_path):
    bundle, texts = load(LIT / "model.npz"), ["two DOGS", "café"]
    bundle.save(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.config == bundle.config
    assert np.array_equal(again.tokenizer(texts), bundle.tokenizer(texts))
    assert np.array_equal(again.encode_text(texts), bundle.encode_text(texts))
    for form in ("huggingface", "open_clip"):
        with pytest.raises(CheckpointError, match="save the model as a vlm bundle instead"):
            bundle.save(tmp_path / form, format=form)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_no_other_format_has_a_place_for_what_a_bert_adds(tmp_path):
    clip, lit = load(GOLDEN / "hf_clip"), load(LIT / "model.npz")
    post = dataclasses.replace(clip.config.text, norm="post")
    config = dataclasses.replace(clip.config, text=post)
    for configured in (huggingface_config, open_clip_config):
        with pytest.raises(
            CheckpointError, match=r"no place for text\.norm 'post' \('pre'\): save"
        ):
            configured(config, clip.tokenizer)
    tokenizer = lit.tokenizer.with_rules(
        dataclasses.replace(lit.tokenizer.config, context_length=config.text.context_length)
    )
    with pytest.raises(CheckpointError, match="no place for the cleaning 'bert'"):
        Bundle(clip.model, clip.preprocess, tokenizer, "x").save(tmp_path / "x", "huggingface")
    size = clip.config.vision.image_size
    bundle = Bundle(clip.model, Preprocess(big_vision.preprocess_config(size)), clip.tokenizer, "x")
    with pytest.raises(CheckpointError, match="no place for TensorFlow's resizing"):
        bundle.save(tmp_path / "x", "huggingface")


def test_the_published_file_is_understood():
    """LiT-B16B: names, shapes and the number of parameters that big_vision's lit.ipynb prints."""
    sizes = {18: 768, 15: 768, 12: 768, 26: 3072, 22: 3072, 3: 12, 6: 64, 17: 197, 114: 30522}
    sizes |= {21: 512, 7: 16}
    published = {}
    for name, shape in np.load(LIT / "model.npz").items():
        shape = tuple(sizes.get(size, size) for size in shape.shape)
        name = re.sub(r"(encoderblock|layers)_0/", r"\1_{}/", name)
        for layer in range(12):
            published[name.format(layer)] = shape
    published["img/embedding/kernel"] = (16, 16, 3, 768)
    assert sum(map(math.prod, published.values())) == 195_870_721 + 768  # cls and its position

    table = f"{ENCODER}/embedder/embedders_{{}}_ids/embedding"
    assert published[table.format("position")] == (512, 768)
    assert published.pop(table.format("segment")) == (2, 768)
    position = published.pop("img/Transformer/posembed_input/pos_embedding")
    published["img/pos_embedding"] = (1, position[1] - 1, 768)
    config = big_vision.model_config(published, "LiT-B16B.npz")
    assert (config.vision.heads, config.text.heads, config.embed_dim) == (12, 12, 768)
    layers = expand(big_vision.rules(config), flat_shapes(abstract_model(config, np.float32)))
    assert {layer.theirs: layer.their_shape for layer in layers} == published


# ----------------------------------------------------------------- the images and the texts


def test_pixels_are_tensorflows():
    golden, preprocess = (
        np.load(GOLDEN / "tensorflow_pixels.npz"),
        load(LIT / "model.npz").preprocess,
    )
    for i in range(6):
        pixels = preprocess.pixels(golden[f"image/{i}"])
        np.testing.assert_array_equal(pixels, golden[f"resized/{i}"], err_msg=f"image {i}")


def small(length=16, **changes) -> ModelConfig:
    return ModelConfig(text=TextConfig(**{"vocab_size": 114, "context_length": length} | changes))


def test_ids_are_tensorflow_texts():
    golden = np.load(GOLDEN / "bert_tokens.npz")
    pairs = zip(golden["texts"], golden["lengths"], strict=True)
    texts = [bytes(text).ljust(n, b"\0").decode() for text, n in pairs]
    assert np.array_equal(
        bert_tokenizer(epath.Path(LIT / "model.npz"), small())(texts), golden["tokens"]
    )


def test_rows_begin_with_cls_and_decode(folder):
    tokenizer = bert_tokenizer(epath.Path(folder / "model.npz"), small())
    rows = tokenizer(["Photo of CATing.", "", "dog " * 40, "\ud800"])
    assert rows[:, 0].tolist() == [2, 2, 2, 2]
    assert rows[1, 1:].tolist() == [0] * 15
    assert (rows[2, 1:] == rows[2, 1]).all()
    assert tokenizer.decode(rows[:1]) == ["photo of cating."]
    assert tokenizer.count_truncated(["dog " * 15, "dog " * 16]) == 1


def test_the_vocabulary_may_have_another_name_or_be_json(folder):
    texts = ["two dogs", "Straße 東京"]
    expected = load(folder / "model.npz").tokenizer(texts)
    (folder / "model.txt").rename(folder / "vocab.txt")
    assert np.array_equal(load(folder / "model.npz").tokenizer(texts), expected)
    words = (folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").unlink()
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    assert np.array_equal(load(folder / "model.npz").tokenizer(texts), expected)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="is not a WordPiece vocabulary"):
        load(folder / "model.npz")


def test_vocabularies_that_are_not_the_models(folder):
    text = (folder / "model.txt").read_text()
    for spoiled, message in (
        (text + "more\n", "has 115 tokens and the embedding table of .* 114 rows"),
        (text.replace("ab\n", "", 1), "has 113 tokens and the embedding table of .* 114 rows"),
        (text.replace("[CLS]", "<s>"), r"has no \[CLS\]: give the vocabulary of a BERT"),
        (text + "cat\n", "has a token twice"),
        ("", r"has no \[CLS\]"),
        (b"\xff\xfe", "is no text"),
    ):
        spoiled = spoiled if isinstance(spoiled, bytes) else spoiled.encode()
        (folder / "model.txt").write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=message):
            load(folder / "model.npz")
    (folder / "model.txt").unlink()
    with pytest.raises(CheckpointError, match=r"put the vocab\.txt of uncased_L-12.* beside the"):
        load(folder / "model.npz")


# ---------------------------------------------------------------------------- the parameters


def change(folder, **arrays):
    """The model with some arrays more, other, or (None) fewer."""
    flat = dict(np.load(LIT / "model.npz")) | arrays
    np.savez(folder / "model.npz", **{k: v for k, v in flat.items() if v is not None})
    return folder / "model.npz"


def test_parameters_that_do_not_fit_are_listed(folder):
    key, pooler = f"{LAYER}/attention_block/attention_layer/key/bias", "txt/pooler/dense/kernel"
    path = change(folder, **{pooler: np.zeros((15, 15)), key: np.zeros((3, 5), np.float32)})
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert f"1 parameter in the file without a place in the model: {pooler}" in message
    assert f"{key} (3, 5) (the model has (15,))" in message
    down = f"{LAYER}/mlp_block/dense_layer/kernel"
    with pytest.raises(CheckpointError, match=f"1 parameter missing from the file: {down}"):
        load(change(folder, **{down: None}))
    up = f"{LAYER}/mlp_block/mlp/dense_layer/kernel"
    with pytest.raises(CheckpointError, match=f"no two-tower model of big_vision .*{up}"):
        load(change(folder, **{up: None}))
    segments = f"{ENCODER}/embedder/embedders_segment_ids/embedding"
    for table in (None, np.zeros((2, 14), np.float32)):
        with pytest.raises(CheckpointError, match=f"has no {segments} as wide as its positions"):
            load(change(folder, **{segments: table}))


def test_a_bert_of_unknown_heads_is_refused(folder, monkeypatch):
    monkeypatch.delitem(big_vision.BERT_HEADS, (15, 3))
    with pytest.raises(CheckpointError, match=r"width 15 and 3 layers.* does not give its heads"):
        load(folder / "model.npz")


def test_newer_files_name_the_positions_of_images_otherwise(folder):
    """The class token without a position of its own: the same function."""
    flat = dict(np.load(LIT / "model.npz"))
    position = flat["img/Transformer/posembed_input/pos_embedding"]
    path = change(
        folder,
        **{
            "img/Transformer/posembed_input/pos_embedding": None,
            "img/cls": flat["img/cls"] + position[:, :1],
            "img/pos_embedding": position[:, 1:],
        },
    )
    bundle, golden = load(path), np.load(LIT / "expected.npz")
    z_image = np.asarray(bundle.model.encode_image(jnp.asarray(golden["pixels"])))
    assert np.abs(z_image - golden["z_image"]).max() < 2e-6
