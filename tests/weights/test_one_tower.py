"""Half a model: one tower is read, the other's tensors are never touched."""

import pathlib

import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError, ConfigError
from vlm.weights.files import SafetensorsFile

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXTS = ["a photo of a cat", "two dogs"]


@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "oc_coca"])
def test_each_half_encodes_as_the_whole(name, monkeypatch, tmp_path):
    image = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    whole = load(GOLDEN / name)
    read = []
    original = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, n, *a: read.append(n) or original(self, n, *a)
    )
    half = load(GOLDEN / name, tower="vision")
    assert not any(n.startswith(("text", "token_embedding")) for n in read)
    assert np.array_equal(half.encode_image(image), whole.encode_image(image))
    assert half.logit_scale == whole.logit_scale
    with pytest.raises(ConfigError, match="without its text tower"):
        half.encode_text(TEXTS)
    with pytest.raises(ConfigError, match="without its text tower"):
        half.save(tmp_path / "half")
    read.clear()
    half = load(GOLDEN / name, tower="text")
    assert not any(n.startswith("vis") for n in read)
    assert np.array_equal(half.encode_text(TEXTS), whole.encode_text(TEXTS))
    with pytest.raises(ConfigError, match="without its vision tower"):
        half.encode_image(image)


@pytest.mark.untyped
def test_bundles_too_and_their_faults(tmp_path):
    whole = load(GOLDEN / "hf_clip")
    whole.save(tmp_path / "b")
    half = load(tmp_path / "b", tower="text")
    assert np.array_equal(half.encode_text(TEXTS), whole.encode_text(TEXTS))
    with pytest.raises(ConfigError, match="'visual' is unknown: choose both, vision or text"):
        load(tmp_path / "b", tower="visual")
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere", tower="text")
