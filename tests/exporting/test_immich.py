"""Exports in Immich's layout, read as immich-machine-learning reads them: Pillow and tokenizers."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from tokenizers import Tokenizer

from vlm.bundle import load
from vlm.cli import main
from vlm.errors import ConfigError
from vlm.exporting import export

GOLDEN = Path(__file__).parent.parent / "weights" / "golden"


def pixels_of(folder: Path, photo: Image.Image) -> np.ndarray:
    """An image as Immich's OpenClipVisualEncoder prepares it."""
    about = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
    size, kernel = about["size"][0], Image.Resampling[about["interpolation"].upper()]
    if about["resize_mode"] == "squash":
        photo = photo.resize((size, size), kernel)
    else:
        short = size / min(photo.size)
        photo = photo.resize((int(photo.width * short), int(photo.height * short)), kernel)
        left, upper = (int(side / 2 - size / 2) for side in photo.size)
        photo = photo.crop((left, upper, left + size, upper + size))
    x = np.asarray(photo.convert("RGB"), np.float32) / 255
    mean, std = (np.array(about[name], np.float32) for name in ("mean", "std"))
    return ((x - mean) / std).transpose(2, 0, 1)[None]


def tokens_of(folder: Path, text: str) -> np.ndarray:
    """A text as Immich's OpenClipTextualEncoder prepares it."""
    length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
    pad = json.loads((folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    return np.array([tokenizer.encode(" ".join(text.split())).ids], np.int32)


def run(folder: Path, tower: str, inputs: dict) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / tower / "model.onnx"))
    return np.asarray(session.run(None, inputs)[0])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oc_vit", "oc_siglip", "oc_nllb"])
def test_immich_computes_the_same(name, tmp_path):
    bundle, out = load(GOLDEN / name), tmp_path / "out"
    found = export(bundle, out, "immich", batches=[1])
    assert set(found.differences) == {"image", "text"}
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        "config.json", "textual/model.onnx", "textual/tokenizer.json",
        "textual/tokenizer_config.json", "visual/model.onnx", "visual/preprocess_cfg.json",
    }  # fmt: skip
    raw = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    z = run(out, "visual", {"image": pixels_of(out, Image.fromarray(raw))})
    assert np.abs(z - bundle.encode_image(raw)).max() < 1e-5
    for text in ("a cat", "Two  dogs,\nplaying in the snow", "x " * 50):
        z = run(out, "textual", {"text": tokens_of(out, text)})
        assert np.abs(z - bundle.encode_text(text)).max() < 1e-5


@pytest.mark.slow
def test_other_tokens_and_pixels_in_immich_are_a_warning(tmp_path, caplog):
    """The small vocabulary of `hf_clip` keeps spaces, which Immich joins."""
    export(load(GOLDEN / "hf_clip"), tmp_path / "spaces", "immich", batches=[1])
    assert "when Immich reads the folder" in caplog.text
    other = load(GOLDEN / "oc_vit", resize_backend="tensor")
    export(other, tmp_path / "resize", "immich", batches=[1])
    assert "Immich resizes images with Pillow" in caplog.text


def test_what_immich_has_not_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="both towers and no classifier: leave out tower"):
        export(load(GOLDEN / "oc_vit"), tmp_path / "out", "immich", tower="vision")
    with pytest.raises(ConfigError, match="prepares images by 'naflex'"):
        export(load(GOLDEN / "oc_naflex"), tmp_path / "out", "immich")
    line = ["export", str(GOLDEN / "oc_vit"), str(tmp_path / "out"), "--format", "immich"]
    assert main([*line, "--tower", "text"]) == 1
    assert "Immich searches images by texts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
