"""Token ids of written folders: those of transformers' AutoTokenizer and open_clip's get_tokenizer.

`check_tokens` says without these libraries how many texts differ; here they are asked themselves.
The texts are the package's own mixtures and captions: names of emoji in seven languages, and the
descriptions of scikit-learn's data sets.
"""

import pathlib
import sys

import numpy as np
import pytest
from etils import epath

from vlm.bundle import load
from vlm.weights.sample_texts import sample_texts
from vlm.weights.token_check import _rows, check_tokens
from vlm.weights.vocabularies import clip_tokenizer

sys.path.append(str(pathlib.Path(__file__).parents[1] / "weights"))
from small_clip import small_clip

pytestmark = pytest.mark.peers
GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
HUGGINGFACE = [
    "hf_clip", "hf_clip_old", "hf_siglip", "hf_siglip_wide", "hf_metaclip_2", "hf_chinese_clip",
    "hf_altclip", "hf_align", "hf_tipsv2", "hf_tipsv2_giant",
]  # fmt: skip
OPEN_CLIP = ["oc_vit", "oc_quick", "oc_mean", "hf_clip"]


def captions() -> list[str]:
    """Real texts, as installed packages have them."""
    emoji, sklearn = pytest.importorskip("emoji"), pytest.importorskip("sklearn.datasets")
    for language in ("de", "es", "fr", "ja", "ko", "pt", "zh"):
        emoji.config.load_language(language)
    named = [
        name.strip(":").replace("_", " ") + f" {char}!"
        for char, held in emoji.EMOJI_DATA.items()
        for language, name in held.items()
        if isinstance(name, str) and language in ("en", "de", "es", "fr", "ja", "ko", "pt", "zh")
    ]
    described = [
        line
        for opened in (sklearn.load_iris, sklearn.load_wine, sklearn.load_digits)
        for line in opened().DESCR.splitlines()
    ]
    return [*described, *named[:: len(named) // 5000]]


@pytest.fixture(scope="module")
def texts():
    real = captions()
    return [*real, *sample_texts(max(0, 10_000 - len(real)))]


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_transformers_makes_the_ids_of_the_model(name, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, out = load(GOLDEN / name), epath.Path(tmp_path / "out")
    ours.save(out, format="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    rows = theirs(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    assert np.array_equal(_rows(out, texts), rows)  # what is compared is what it does
    assert np.array_equal(ours.tokenizer(texts), rows)


@pytest.mark.parametrize("clean", ["clip", "clip_cased", "clip_canonical"])
def test_clips_own_vocabulary(clean, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    rules = {"context_length": 77, "vocab_size": 49_408}
    ours = small_clip(clip_tokenizer(77, clean=clean), **rules)
    ours.save(out := epath.Path(tmp_path / "out"), format="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    rows = theirs(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    differ = (ours.tokenizer(texts) != rows).any(axis=1)
    assert check_tokens(out, ours.tokenizer, texts).differ == differ.sum()
    real = len(captions())
    assert differ[:real].sum() == 0
    assert differ.mean() < 0.02


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_makes_the_ids_of_the_model(name, texts, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    ours, out = load(GOLDEN / name), epath.Path(tmp_path / "out")
    ours.save(out, format="open_clip")
    rows = open_clip.get_tokenizer(f"local-dir:{out}")(texts).numpy()
    differ = int((ours.tokenizer(texts) != rows).any(axis=1).sum())
    assert check_tokens(out, ours.tokenizer, texts).differ == differ
    if ours.tokenizer.config.clean != "none":  # it always repairs mojibake and joins white space
        assert differ == 0
