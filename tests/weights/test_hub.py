"""Hub names without a network: what is cached loads, and what is not says where it would be.

With one: test_hub_download.py.
"""

import pathlib
import shutil

import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights.hub import is_hub_id

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "vlm"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(cache, name, source, leave_out=()):
    """A model in the layout of the Hub's cache."""
    folder = cache / ("models--" + name.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    shutil.copytree(source, folder / "snapshots" / "abc123")
    for name in leave_out:
        (folder / "snapshots" / "abc123" / name).unlink()
    return folder


def test_a_cached_model_loads(offline):
    cached(offline, "someone/model", GOLDEN / "hf_clip")
    assert load("someone/model").name == "someone/model"
    assert load("hf-hub:someone/model").embed_dim == 20


def test_no_network_and_no_copy(offline):
    with pytest.raises(CheckpointError) as caught:
        load("someone/absent")
    message = str(caught.value)
    assert "cannot be reached" in message
    assert "run `hf download someone/absent` elsewhere and copy it to" in message
    assert str(offline / "models--someone--absent") in message


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"]
)
def test_half_a_download(offline, missing):
    cached(offline, "someone/half", GOLDEN / "hf_clip", leave_out=[missing])
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        load("someone/half")


def test_what_looks_like_a_hub_name():
    assert is_hub_id("google/siglip2-base-patch16-256")
    assert not any(map(is_hub_id, ["/abs/path", "a/b/c", "name", "gs://bucket/x.npz", "./run/x"]))


def test_a_short_name_is_a_hub_model(offline, caplog, monkeypatch):
    name = "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"
    cached(offline, name, GOLDEN / "oc_eva02")
    caplog.set_level("INFO", "vlm.weights")
    bundle = load("eva02_b_16")
    assert (bundle.name, bundle.source) == (name, name)
    assert caplog.messages == [f"eva02_b_16 is {name}"]
    monkeypatch.chdir(offline)
    shutil.copytree(GOLDEN / "hf_clip", "EVA02-B-16")  # a local path takes precedence
    assert load("EVA02-B-16").source == str(offline / "EVA02-B-16")


def test_an_unknown_name_has_suggestions():
    with pytest.raises(CheckpointError, match=r"no model 'ViT-B-23': .* such as ViT-B-32, ViT-B-1"):
        load("ViT-B-23")
    with pytest.raises(CheckpointError, match=r"no model 'qwerty': check the path$"):
        load("qwerty")
