"""Folders of tokenizers as transformers writes and reads them: make_tokenizers.py."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath

from vlm.config import ModelConfig, TextConfig
from vlm.errors import CheckpointError
from vlm.weights.vocabularies import huggingface_tokenizer

FOLDER = pathlib.Path(__file__).parent / "golden" / "tokenizers"
CONFIG = ModelConfig(text=TextConfig(vocab_size=1024, context_length=16))
TEXTS = json.loads((FOLDER / "texts.json").read_text())
NAMES = [
    f"{kind}_{variant}"
    for kind in ("bert", "roberta", "xlmr")
    for variant in ("slow", "fast", "added", "left", "cut_left")
]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name):
    tokenizer = huggingface_tokenizer(epath.Path(FOLDER / name), CONFIG)
    ids = np.load(FOLDER / name / "ids.npz")["ids"]
    ours = tokenizer(TEXTS)
    differ = np.flatnonzero((ours != ids).any(axis=1))
    shown = [(TEXTS[i], ours[i].tolist(), ids[i].tolist()) for i in differ[:2]]
    assert not len(differ), f"{len(differ)} of {len(TEXTS)}: {shown}"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("roberta_slow", "LlamaTokenizer", r"vocab\.json is of the class 'LlamaTokenizer'"),
        ("xlmr_slow", "CamembertTokenizer", r"bpe\.model is of the class 'CamembertTokenizer'"),
        ("bert_slow", "FunnelTokenizer", r"vocab\.txt is of the class 'FunnelTokenizer'"),
        ("bert_slow", "MPNetTokenizer", r"vocab\.txt is of the class 'MPNetTokenizer'"),
        ("roberta_slow", "CLIPTokenizer", r"vocab\.json has no <\|startoftext\|>"),
    ],
)
def test_files_of_another_class_are_refused(name, kind, message, tmp_path):
    folder = shutil.copytree(FOLDER / name, tmp_path / name)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(CheckpointError, match=message):
        huggingface_tokenizer(epath.Path(folder), CONFIG)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"add_prefix_space": False}, "add_prefix_space is false, and vlm supports only true"),
        ({"bos_token": "[CLS]"}, r"bos_token is '\[CLS\]', and vlm supports only <s>"),
        ({"eos_token": {"content": "<s>"}}, "eos_token is '<s>', and vlm supports only </s>"),
        ({"add_prefix_space": True, "bos_token": "<s>", "eos_token": "</s>"}, None),
    ],
)
def test_settings_of_xlm_roberta_pieces(setting, message, tmp_path):
    folder = shutil.copytree(FOLDER / "xlmr_slow", tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "XLMRobertaTokenizer"} | setting)
    )
    if message is None:
        huggingface_tokenizer(epath.Path(folder), CONFIG)
        return
    with pytest.raises(CheckpointError, match=message):
        huggingface_tokenizer(epath.Path(folder), CONFIG)


def test_damaged_pieces_are_refused(tmp_path):
    folder = shutil.copytree(FOLDER / "xlmr_slow", tmp_path / "damaged")
    file = folder / "sentencepiece.bpe.model"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
        huggingface_tokenizer(epath.Path(folder), CONFIG)


def test_merges_without_ends_are_refused(tmp_path):
    folder = shutil.copytree(FOLDER / "roberta_slow", tmp_path / "other")
    (folder / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(CheckpointError, match=r"vocab\.json has no <s>, as RoBERTa's has"):
        huggingface_tokenizer(epath.Path(folder), CONFIG)
