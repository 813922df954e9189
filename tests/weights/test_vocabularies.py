"""Vocabularies: OpenAI's own, SentencePiece files, and folders that lack something."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers
from etils import epath

from vlm.config import ModelConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.weights import sentencepiece
from vlm.weights.registry import open_checkpoint
from vlm.weights.vocabularies import (
    clip_tokenizer,
    huggingface_tokenizer,
    open_clip_tokenizer,
    siglip_tokenizer,
)
from vlm.weights.writing_tokenizer import standalone

GOLDEN = pathlib.Path(__file__).parent / "golden"


def test_clip_ids_are_open_clips():
    golden = np.load(GOLDEN / "clip_tokens.npz")
    pairs = zip(golden["texts"], golden["lengths"], strict=True)
    texts = [bytes(text).ljust(n, b"\0").decode() for text, n in pairs]
    assert np.array_equal(clip_tokenizer(77)(texts), golden["tokens"])


def test_clip_rows_begin_end_and_decode():
    tokenizer = clip_tokenizer(10)
    rows = tokenizer(["a photo of a cat", "", "long " * 50])
    assert rows[:, 0].tolist() == [49406] * 3
    assert rows[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0, 0]
    assert rows[1, :3].tolist() == [49406, 49407, 0]
    assert rows[2, -1] == 49407
    assert tokenizer.decode(rows) == ["a photo of a cat", "", " ".join(["long"] * 8)]
    assert tokenizer.count_truncated(["short", "long " * 50]) == 1


def test_sentencepiece_file_of_siglip():
    golden = np.load(GOLDEN / "siglip_tokens.npz")
    tokenizer = siglip_tokenizer(GOLDEN / "spiece.model", 16)
    assert np.array_equal(tokenizer(golden["texts"].tolist()), golden["tokens"])


# What the sentencepiece package makes of the same file.
SPELLED_OUT = {
    "a\u2581": ["\u2581a"], "a \u2581 \u2581 ": ["\u2581a"], "\u2581 ": [], "": [],
    "  a  ": ["\u2581a"], "\u2581a": ["\u2581", "\u2581a"],
    "a \u2581a": ["\u2581a", "\u2581", "\u2581a"],
    "a\u2581\n": ["\u2581a", "\u2581", "\n"], "\u3000a": ["\u2581", "\u3000", "a"],
}  # fmt: skip


@pytest.mark.parametrize("text", SPELLED_OUT)
def test_spaces_that_are_spelled_out(text):
    """At the end they go as spaces do, elsewhere they stay, and other white space is no space."""
    vocabulary = sentencepiece.read(GOLDEN / "spiece.model")
    assert vocabulary.encode(text).tokens == SPELLED_OUT[text]


def test_siglips_vocabulary_stands_alone():
    """In a `tokenizer.json` of its own, which has the cleaning in it."""
    texts = ["a photo of a cat", "Two DOGS!", "", "naïve\tcafé 🙂", "words " * 40]
    rows = siglip_tokenizer(GOLDEN / "spiece.model", 16)(texts)
    alone = standalone(siglip_tokenizer(GOLDEN / "spiece.model", 16))
    for text, row in zip(texts, rows, strict=True):
        ids = alone.encode(text).ids
        assert [*ids[:-1][:15], 1] == row[: min(len(ids), 16)].tolist(), text


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_truncated_sentencepiece_file(size, tmp_path):
    whole = (GOLDEN / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(whole[:size] + (b"\xff" * 9 if size == 5000 else b""))
    with pytest.raises(CheckpointError, match="SentencePiece model"):
        siglip_tokenizer(tmp_path / "spiece.model", 16)


def test_folders_without_what_a_tokenizer_needs(tmp_path):
    config = ModelConfig(text=TextConfig(vocab_size=300, context_length=8))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        huggingface_tokenizer(epath.Path(tmp_path), config)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is not a tokenizer\.json"):
        huggingface_tokenizer(epath.Path(tmp_path), config)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match="is not JSON"):
        huggingface_tokenizer(epath.Path(tmp_path), config)


def test_vocab_and_merges_files(tmp_path):
    """Old CLIP folders have no tokenizer.json, but OpenAI's vocabulary in two files."""
    from vlm.weights import vocabularies

    packaged = pathlib.Path(vocabularies.__file__).parent / "clip" / "tokenizer.json"
    model = json.loads(packaged.read_text())["model"]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): i for token, i in model["vocab"].items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    config = ModelConfig(text=TextConfig(vocab_size=49408, context_length=12))
    texts = ["a photo of a CAT", "## a #: b #... #@ c"]  # pairs that start with "#"
    rows = huggingface_tokenizer(epath.Path(tmp_path), config)(texts)
    expected = clip_tokenizer(12)([text.lower() for text in texts])
    expected[expected == 0] = 49407  # transformers pads with the end token
    assert np.array_equal(rows, expected)
    (tmp_path / "merges.txt").write_text("\n".join([*lines[:9], "a b c"]))
    with pytest.raises(CheckpointError, match=r"merges\.txt: line 10 is 'a b c', not a pair"):
        huggingface_tokenizer(epath.Path(tmp_path), config)


@pytest.mark.parametrize("strip", [False, True])
def test_a_separator_inside_a_text(tmp_path, strip):
    """open_clip's `strip_sep_token` makes every separator of a row token 0, those of the text too:
    `torch.where(input_ids == sep_token_id, 0, input_ids)` over what transformers gives it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "[", "]", "sep"]
    vocab = {word: i for i, word in enumerate(words)}
    bert = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    bert.normalizer = tokenizers.normalizers.BertNormalizer()
    bert.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    bert.add_special_tokens(words[:4])
    bert.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "sep_token": "[SEP]"}'
    )
    options: dict[str, object] = {"hf_tokenizer_name": "bert-base-uncased"}
    options["tokenizer_kwargs"] = {"strip_sep_token": strip}
    text = TextConfig(vocab_size=9, context_length=8, width=768)
    ours = open_clip_tokenizer(epath.Path(tmp_path), options, ModelConfig(text=text))

    bert.enable_truncation(8)
    bert.enable_padding(length=8)
    texts = ["a cat", "a [SEP] cat", "[SEP]", "a[SEP][SEP]cat", "a [sep] cat", "cat " * 20, ""]
    expected = np.array([encoding.ids for encoding in bert.encode_batch(texts)])
    if strip:
        expected = np.where(expected == 3, 0, expected)
    assert np.array_equal(ours(texts), expected)
    assert ours.decode(ours(["a cat"])) == ["a cat"]


def test_the_pieces_of_t5_end_with_its_end_token(tmp_path):
    """A folder with `spiece.model` and no `tokenizer.json`, as T5's own."""
    for file in (GOLDEN / "oc_mt5").iterdir():
        if file.name != "tokenizer.json":
            shutil.copy(file, tmp_path)
    shutil.copy(GOLDEN / "spiece.model", tmp_path)
    about = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = open_checkpoint(epath.Path(tmp_path)).tokenizer
    end = tokenizer.vocabulary.token_to_id("</s>")
    assert tokenizer.config.eos_id == end
    assert end in tokenizer(["a cat"])[0]
    # Without a class, that of the model's type.
    (tmp_path / "tokenizer_config.json").write_text("{}")
    named = open_checkpoint(epath.Path(tmp_path)).tokenizer
    assert named.config.eos_id == end
    assert np.array_equal(named(["a cat"])[0][:4], tokenizer(["a cat"])[0][:4])


@pytest.mark.parametrize(
    ("about", "kind", "message"),
    [
        ({"model_type": "siglip"}, None, None),
        ({}, None, r"spiece\.model has no class: write tokenizer_class into"),
        ({"model_type": "xlnet"}, None, r"spiece\.model has no class"),
        ({"model_type": "siglip"}, "AlbertTokenizer", "of the class 'AlbertTokenizer'"),
        ({"model_type": "siglip"}, "XLNetTokenizerFast", "of the class 'XLNetTokenizer'"),
    ],
)
def test_the_class_of_a_file_of_pieces(about, kind, message, tmp_path):
    shutil.copy(GOLDEN / "spiece.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(about))
    settings = {} if kind is None else {"tokenizer_class": kind}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(text=TextConfig(vocab_size=120, context_length=12))
    if message:
        with pytest.raises(CheckpointError, match=message):
            huggingface_tokenizer(epath.Path(tmp_path), config)
    else:
        tokenizer = huggingface_tokenizer(epath.Path(tmp_path), config)
        assert tokenizer.config == siglip_tokenizer(GOLDEN / "spiece.model", 12).config
