"""Model folders that anybody may have made: an expensive one is an error of one sentence, and soon.

Each may take 5 s of processor time and 1 GiB.
"""

import base64
import json
import pathlib
import resource
import shutil
import struct
import sys
import time
import zipfile

import numpy as np
import pytest
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vlm.bundle import Bundle, load
from vlm.config import ModelConfig, PreprocessConfig, TextConfig, TokenizerConfig, ViTConfig
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import Tokenizer, read_vocabulary, train_bpe
from vlm.weights import sentencepiece
from vlm.weights.big_vision import NpzFile
from vlm.weights.charsmap import charsmap
from vlm.weights.files import Arrays, SafetensorsFile, Shards
from vlm.weights.vocabularies import clip_tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = ModelConfig(
    vision=ViTConfig(
        image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16,
        pool="mean", projection="linear",
    ),
    text=TextConfig(
        vocab_size=300, context_length=40, width=16, depth=1, heads=2, mlp_dim=16,
        causal=True, pool="end", end_id=1, projection="linear",
    ),
    embed_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from flax import nnx

    from vlm.models.dual_encoder import DualEncoder

    folder = tmp_path_factory.mktemp("models") / "bundle"
    tokenizer = train_bpe(["a red square"], 300, CONFIG.text.context_length)
    preprocess = Preprocess(PreprocessConfig(image_size=16))
    Bundle(DualEncoder(CONFIG, rngs=nnx.Rngs(0)), preprocess, tokenizer, "small").save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "bundle"))


def refused(act, message, kinds=(CheckpointError, DataError, ConfigError)):
    """Check that a call raises an error of one line, within the limits."""
    unit = 1 if sys.platform == "darwin" else 1024
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(kinds, match=message) as refusal:
        act()
    assert time.process_time() - start < 5
    assert unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 1 << 30
    assert len(str(refusal.value)) < 1000
    assert "\n" not in str(refusal.value)


def with_header(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    return path


def empty_tensors(names):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return "{" + ",".join(f'"{name}":{entry}' for name in names) + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (empty_tensors([*(f"t{i}" for i in range(100_000)), "t5"]), "'t5' appears twice"),
        (empty_tensors(f"t{i}" for i in range(60_000)), "lists 60,000 tensors"),
        ('{"a":[' + "[]," * 5_000_000 + "[]]}", "more than 1,000,000 values"),
        ('{"a":' + "[" * 900_000, "nested too deep"),
        (
            '{"a":{"dtype":"F32","shape":[' + "1000000," * 500_000 + '1],"data_offsets":[0,4]}}',
            "a tensor of 500,001 axes",
        ),
        (
            '{"a":{"dtype":"F32","shape":[' + "9" * 4000 + '],"data_offsets":[0,4]}}',
            "not a whole number of 64 bits",
        ),
        ('{"a":{"dtype":"F32","shape":[' + "9" * 9000 + '],"data_offsets":[0,4]}}', "damaged"),
    ],
)
def test_headers_of_safetensors(folder, text, message):
    with_header(folder / "model.safetensors", text)
    refused(lambda: load(folder), message)


def test_settings_of_many_values(folder):
    (folder / "bundle.json").write_text('{"a":[' + "[]," * 8_000_000 + "[]]}")
    refused(lambda: load(folder), "more than 4,000,000 values")


def test_a_name_in_two_of_many_shards():
    files = [
        Arrays({f"{n}.{i}": np.zeros(1) for i in range(20)} | {}, f"file {n}") for n in range(2000)
    ]
    refused(lambda: Shards([*files, files[7]]), r"file 7 has '7\.0', which file 7 has too")


def vocabulary(**parts):
    built = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]"))
    for name, part in parts.items():
        setattr(built, name, part)
    return json.loads(built.to_str())


REPEAT = [normalizers.Replace("a", "a" * 1000)] * 4


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (vocabulary(normalizer=normalizers.Sequence(REPEAT)), "1,000,000,000,000 times as long"),
        (
            vocabulary(
                normalizer=normalizers.Sequence(
                    [normalizers.Replace(tokenizers.Regex(""), "b" * 20)] * 2
                )
            ),
            "441 times as long",
        ),
        (vocabulary(normalizer=normalizers.Replace("a", "b" * 2000)), "a text of 2,000 characters"),
        (vocabulary(normalizer=normalizers.Prepend("b" * 2000)), "a text of 2,000 characters"),
        (vocabulary(normalizer=normalizers.Sequence([normalizers.ByteLevel()] * 9)), "512 times"),
        (vocabulary(normalizer=normalizers.Sequence([normalizers.NFC()] * 600)), "600 steps|601"),
        (vocabulary(normalizer=normalizers.Precompiled(charsmap({"a": "b" * 999}))), "999 times"),
        (vocabulary(decoder=decoders.Replace("a", "a" * 1000)), "decoder could make a text 1,000"),
        (
            vocabulary()
            | {"model": {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}},
            "ids go up to 2,147,483,648, for 1 tokens",
        ),
        (vocabulary() | {"added_tokens": [{"special": True}] * 30_000}, "30,000 added tokens"),
        (vocabulary() | {"extra": [[]] * 4_100_000}, "more than 4,000,000 values"),
        (
            vocabulary() | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "is not a tokenizer.json",
        ),
    ],
)
def test_vocabularies(tmp_path, contents, message):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(contents))
    refused(lambda: read_vocabulary(file), message)


def test_deep_vocabularies(tmp_path):
    file = tmp_path / "tokenizer.json"
    step = '{"type":"Sequence","normalizers":['
    file.write_text(f'{{"normalizer": {step * 20_000}{"]}" * 20_000}}}')
    refused(lambda: read_vocabulary(file), "recursion limit|not a tokenizer.json")


def test_a_regular_expression_that_takes_too_long(tmp_path):
    """The library panics, which is no Exception."""
    file = tmp_path / "tokenizer.json"
    slow = pre_tokenizers.Split(tokenizers.Regex("(a+)+$|(.+)*x"), "isolated")
    file.write_text(json.dumps(vocabulary(pre_tokenizer=slow)))
    rules = TokenizerConfig(context_length=8, pad_id=0, eos_id=None)
    tokenizer = Tokenizer.from_file(file, rules)
    refused(lambda: tokenizer(["a" * 50 + "b"]), "cannot tokenize these texts .*retry-limit")


def test_sound_vocabularies_are_within_the_limits():
    clip_tokenizer(77)
    for file in GOLDEN.rglob("tokenizer.json"):
        read_vocabulary(file)
    for file in GOLDEN.rglob("*.model"):
        sentencepiece.read(epath.Path(file))


def field(number, wire, data):
    return bytes([number << 3 | wire]) + data


def piece(text, number=1):
    inner = field(1, 2, bytes([len(text)]) + text) if len(text) < 128 else text
    return field(number, 2, bytes([len(inner)]) + inner)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (field(1, 0, b"\x05"), "is not a SentencePiece model"),  # a number for a piece
        (field(1, 2, b"\x02" + field(2, 0, b"\x01")), "is not a SentencePiece model"),
        (field(1, 2, b"\x00"), "is not a SentencePiece model"),
        (b"\x80" * 3_000_000, "more than 64 bits"),
        (piece(b"\xff\xfe"), "is not a SentencePiece model"),
        (field(3, 2, b"\x06" + field(2, 2, b"\x04AAAA")) + piece(b"a"), "is not a Sentence"),
        (field(1, 2, b"\x87\x10" + field(1, 2, b"\x84\x10" + b"a" * 2052)), "a piece of 2,052"),
    ],
)
def test_sentencepiece_files(tmp_path, data, message):
    (tmp_path / "a.model").write_bytes(data)
    refused(lambda: sentencepiece.read(tmp_path / "a.model"), message)


def test_large_sentencepiece_files(tmp_path):
    with (tmp_path / "a.model").open("wb") as file:
        file.truncate(1 << 32)
    refused(lambda: sentencepiece.read(tmp_path / "a.model"), "which no vocabulary has")


def npy(shape, length=None):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", length or len(text)) + text


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("img/cls", npy((1 << 40, 1 << 20)), "would inflate from"),
        ("img/cls", npy((1 << 62, 1 << 62, 1 << 62)), "would inflate from"),
        ("img/cls", npy((4, 4)) + bytes(100), ""),
        ("img/cls", npy("(" * 9_000), "header is corrupt"),
        ("img/cls", npy((2, 2), length=2**32 - 1) + bytes(200 << 20), "header is too long"),
        ("img/Transformer/encoderblock/x", npy((10**9,)), "would inflate|stacks"),
        ("img/Transformer/encoderblock/x", npy((10**6,)), "stacks 1,000,000 layers"),
        ("img/Transformer/encoderblock/x", npy(()), ""),
    ],
)
def test_archives_of_numpy(tmp_path, name, data, message):
    file = tmp_path / "model.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", data)
    refused(lambda: load(file), message)


def test_many_members_of_an_archive(tmp_path):
    file = tmp_path / "model.npz"
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(20_001):
            archive.writestr(f"{i}.npy", b"")
    refused(lambda: NpzFile(file), "20,001 members")


def test_a_file_of_safetensors_may_have_many_tensors(tmp_path):
    path = with_header(tmp_path / "a.safetensors", empty_tensors(map(str, range(10_000))))
    assert len(SafetensorsFile(path).shapes) == 10_000


def test_precompiled_maps_of_published_models_are_not_too_long():
    from vlm.inputs.vocabulary_check import _longest

    state = json.loads(normalizers.Precompiled(charsmap({"a": "bcd", "é": "e"})).__getstate__())
    assert _longest(base64.b64decode(state["precompiled_charsmap"])) == 3
