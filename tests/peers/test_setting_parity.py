"""Settings of tokenizers and image processors, changed: as in transformers, or refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from vlm.errors import CheckpointError
from vlm.inputs.preprocess import Preprocess
from vlm.weights.registry import describe
from vlm.weights.sample_texts import sample_texts

pytestmark = pytest.mark.peers
GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
TEXTS = [text for text in sample_texts(600) if "<" not in text]
TOKENS = [
    {"padding_side": "left"}, {"padding_side": "right"}, {"truncation_side": "left"},
    {"model_max_length": 6}, {"pad_token": "a"},
    {"pad_token": {"__type": "AddedToken", "content": "a", "lstrip": True}},
    {"unk_token": "b"}, {"additional_special_tokens": ["c", "d"]}, {"mask_token": "e"},
    {"split_special_tokens": True}, {"pad_token": "!", "split_special_tokens": True},
    {"add_bos_token": False}, {"add_eos_token": False}, {"clean_up_tokenization_spaces": True},
    {"do_lower_case": False}, {"do_lower_case": True}, {"strip_accents": True},
    {"tokenize_chinese_chars": False}, {"model_input_names": ["input_ids"]},
    {"added_tokens_decoder": {"5": {"content": "x"}}},
]  # fmt: skip
KINDS = {
    "hf_clip": ["PreTrainedTokenizerFast"],
    "hf_siglip": ["PreTrainedTokenizerFast"],
    "hf_align": ["BertTokenizer"],
}
PIXELS = [
    {"do_rescale": False}, {"rescale_factor": 0.01}, {"do_center_crop": False}, {"resample": 2},
    {"resample": 0}, {"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3]}, {"do_pad": True},
    {"do_convert_rgb": False}, {"do_convert_rgb": None}, {"crop_size": 20}, {"size": 40},
    {"image_std": [0.5, 0.5, 0.5]}, {"do_resize": False}, {"data_format": "channels_first"},
    {"default_to_square": True}, {"input_data_format": None},
]  # fmt: skip

# Those that are refused, and the words by which, where they are not the name of the setting.
REFUSED = dict.fromkeys(
    [
        "added_tokens_decoder",
        "do_rescale",
        "rescale_factor",
        "do_pad",
        "do_resize",
    ]
) | {
    ("hf_clip", "add_bos_token"): None,
    ("hf_clip", "add_eos_token"): None,
    ("hf_siglip", "add_eos_token"): None,
    ("hf_align", "add_bos_token"): None,
    ("hf_align", "add_eos_token"): None,
    ("hf_align", "pad_token"): "pad_token_id",  # which its config.json has too
    ("hf_clip", "do_center_crop"): "does not crop",
    ("hf_siglip", "size"): "does not crop",
}


def changed(name, tmp_path, file, change):
    shutil.copytree(GOLDEN / name, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return tmp_path / "model"


@pytest.mark.parametrize("change", TOKENS, ids=lambda c: "+".join(c))
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, ks in KINDS.items() for k in ks])
def test_tokenizers(name, kind, change, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = changed(name, tmp_path, "tokenizer_config.json", change | {"tokenizer_class": kind})
    (key, *_) = change
    if key in REFUSED or (name, key) in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED.get((name, key)) or key):
            describe(folder)
        return
    ours = describe(folder)[0].tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    length = min(theirs.model_max_length, ours.config.context_length)
    rows = theirs(
        TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )["input_ids"]
    assert np.array_equal(ours(TEXTS), rows)


@pytest.mark.parametrize("change", PIXELS, ids=lambda c: "+".join(map(str, c)))
@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip"])
def test_image_processors(name, change, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = changed(name, tmp_path, "preprocessor_config.json", change)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (50, 37, 3), np.uint8)) for _ in range(2)]
    (key,) = change
    if key in REFUSED or (name, key) in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED.get((name, key)) or key):
            describe(folder)
        return
    ours = Preprocess(describe(folder)[0].preprocess)(images)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = theirs(images, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    assert np.abs(ours - pixels).max() < 3e-6
