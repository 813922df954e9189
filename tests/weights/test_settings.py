"""Settings of tokenizers and image processors: each is honoured or refused by name."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights.registry import describe

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXTS = ["a cat", "Two DOGS!", "a photo of a cat on a mat in a hat", "café"]


@pytest.fixture
def folder(tmp_path):
    def copy(name, **files):
        shutil.copytree(GOLDEN / name, tmp_path / name, dirs_exist_ok=True)
        for file, change in files.items():
            path = tmp_path / name / f"{file}.json"
            held = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(held | change))
        return tmp_path / name

    return copy


def tokens(path):
    return describe(path)[0].tokenizer(TEXTS)


REFUSED = [
    ("hf_clip", {"padding_side": "top"}, "padding_side is 'top'"),
    ("hf_clip", {"pad_token": "[PAD]"}, r"pad_token '\[PAD\]' is not in its vocabulary"),
    ("hf_clip", {"add_eos_token": False}, "add_eos_token is False, and tokenizer.json adds"),
    ("hf_clip", {"model_max_length": "many"}, "model_max_length is 'many'"),
    ("hf_clip", {"fold_case": True}, "has fold_case True, which vlm does not support"),
    ("hf_clip", {"sp_model_kwargs": {"alpha": 0.1}}, "sp_model_kwargs"),
    ("hf_clip", {"added_tokens_decoder": {"7": {"content": "cat"}}}, "gives 'cat' the id 7"),
    ("hf_siglip", {"do_basic_tokenize": False}, "do_basic_tokenize False: vlm supports only True"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_a_setting_of_a_tokenizer_is_refused(folder, name, change, words):
    with pytest.raises(CheckpointError, match=words):
        describe(folder(name, tokenizer_config=change))


def test_settings_of_a_tokenizer_are_honoured(folder):
    plain = tokens(GOLDEN / "hf_siglip")
    left = tokens(folder("hf_siglip", tokenizer_config={"padding_side": "left"}))
    assert all(sorted(a) == sorted(b) for a, b in zip(plain.tolist(), left.tolist(), strict=True))
    assert left[0, 0] == 0 != plain[0, 0]
    # Gemma's class pads on the left where the file does not say.
    assert np.array_equal(
        tokens(folder("hf_siglip", tokenizer_config={"padding_side": None})), left
    )
    short = tokens(folder("hf_siglip", tokenizer_config={"model_max_length": 5}))
    assert short.shape == (4, 5)
    assert short[2, -1] == 1  # its end token


def test_named_tokens_become_special_tokens(folder):
    plain = tokens(GOLDEN / "hf_clip")
    vocabulary = describe(GOLDEN / "hf_clip")[0].tokenizer.vocabulary
    name = "a"  # a token that is a part of words
    own = tokens(folder("hf_clip", tokenizer_config={"pad_token": name}))
    assert not np.array_equal(own, plain)  # cut out of every word, as transformers does
    older = tokens(
        folder(
            "hf_clip", tokenizer_config={"pad_token": "b"}, special_tokens_map={"pad_token": name}
        )
    )
    assert np.array_equal(older, own)
    off = {"pad_token": name, "split_special_tokens": True}
    read = tokens(folder("hf_clip", tokenizer_config=off))
    pads = vocabulary.token_to_id(name)
    assert read[0].tolist().count(pads) > 0
    text_part = [i for i in read[1].tolist() if i != pads]
    assert text_part == [i for i in plain[1].tolist() if i != plain[1, -1]] + [plain[1, -1]]


def test_tokens_of_an_older_file(folder):
    vocabulary = describe(GOLDEN / "hf_clip")[0].tokenizer.vocabulary
    number = vocabulary.token_to_id("b")
    changed = tokens(folder("hf_clip", added_tokens={"b": number}))
    assert changed.shape == tokens(GOLDEN / "hf_clip").shape
    with pytest.raises(CheckpointError, match="gives 'b' the id 3"):
        describe(folder("hf_clip", added_tokens={"b": 3}))


PIXELS = [
    ("hf_clip", {"image_processor_type": "BeitImageProcessor"}, "image_processor_type is 'Beit"),
    ("hf_clip", {"do_rescale": False}, "turns do_rescale off"),
    ("hf_clip", {"do_resize": False}, "turns do_resize off"),
    ("hf_clip", {"rescale_factor": 1 / 127.5}, "rescale_factor"),
    (
        "hf_clip",
        {"do_pad": True},
        "has do_pad True, which vlm does not support for CLIPImageProcessor",
    ),
    ("hf_clip", {"do_center_crop": False}, "does not crop"),
    ("hf_clip", {"resample": 4}, "resample 4"),
    ("hf_clip", {"crop_pct": 0.9}, "crop_pct"),
    ("hf_clip", {"include_top": True}, "include_top True"),
    ("hf_siglip", {"size_divisor": 32}, "size_divisor 32"),
    ("hf_siglip", {"gamma": 2.2}, "has gamma 2.2, which vlm does not support"),
]


@pytest.mark.parametrize(("name", "change", "words"), PIXELS)
def test_a_setting_of_an_image_processor_is_refused(folder, name, change, words):
    with pytest.raises(CheckpointError, match=words):
        describe(folder(name, preprocessor_config=change))


def test_the_nested_file_comes_first(folder):
    nested = json.loads((GOLDEN / "hf_siglip" / "preprocessor_config.json").read_text())
    path = folder(
        "hf_siglip", processor_config={"image_processor": nested | {"image_mean": [0.1] * 3}}
    )
    assert describe(path)[0].preprocess.mean == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("preprocess_cfg", {"mode": "L"}, "mode is 'L'"),
        ("preprocess_cfg", {"interpolation": "lanczos"}, "interpolation is 'lanczos'"),
        ("preprocess_cfg", {"resize_mode": "stretch"}, "resize_mode is 'stretch'"),
        ("preprocess_cfg", {"fill_color": [1, 2, 3]}, "fill_color"),
        ("preprocess_cfg", {"crop_pct": 0.9}, "has crop_pct 0.9"),
        ("model_cfg", {"logit_softcap": 30.0}, "has logit_softcap 30.0"),
    ],
)
def test_a_setting_of_open_clip_is_refused(folder, part, change, words):
    path = folder("oc_vit")
    file = path / "open_clip_config.json"
    held = json.loads(file.read_text())
    held[part] |= change
    file.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=words):
        describe(path)


def test_what_is_written_is_read_with_every_setting(tmp_path):
    for name, form in (("hf_clip", "huggingface"), ("oc_quick", "open_clip")):
        load(GOLDEN / name).save(tmp_path / name, format=form, compare_texts=20)
        describe(tmp_path / name)
