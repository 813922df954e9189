"""Ours to a public format and back: bit-equal parameters, equal tokens, and honest refusals."""

import dataclasses
import pathlib

import numpy as np
import pytest

from vlm.bundle import load
from vlm.errors import CheckpointError
from vlm.weights.rules import flat_arrays
from vlm.weights.writing import huggingface_config, open_clip_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROUND_TRIPS = [
    ("hf_clip", "huggingface"), ("hf_clip_old", "huggingface"), ("hf_siglip", "huggingface"),
    ("hf_siglip_wide", "huggingface"), ("oc_vit", "open_clip"), ("oc_quick", "open_clip"),
    ("oc_mean", "open_clip"), ("hf_clip", "open_clip"), ("oc_quick", "huggingface"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form"), ROUND_TRIPS)
def test_there_and_back_is_bit_equal(name, form, tmp_path):
    ours = load(GOLDEN / name)
    ours.save(tmp_path / "theirs", format=form)
    again = load(tmp_path / "theirs")
    before, after = flat_arrays(ours.model), flat_arrays(again.model)
    assert [n for n, _ in before] == [n for n, _ in after]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))
    # The same function too: what is configured differently must not matter.
    same = {"class_token": True, "norm_pooled": False, "patch_dropout": 0.0}
    vision = [dataclasses.replace(b.config.vision, **same) for b in (ours, again)]
    if ours.config.vision.pool == "class":
        assert vision[0] == vision[1]
    else:
        assert ours.config.vision == again.config.vision
    assert ours.config.text == again.config.text
    assert again.preprocess.config == dataclasses.replace(
        ours.preprocess.config, crop_offset=again.preprocess.config.crop_offset
    )
    texts = ["a photo of a cat", "Two DOGS!", "", "x" * 90]
    if not (name.startswith("hf") and form == "open_clip"):  # open_clip always joins white space
        texts.append("tabs\tand\nlines")
    assert np.array_equal(ours.tokenizer(texts), again.tokenizer(texts))


def test_nothing_is_written_over_or_in_part(tmp_path):
    bundle = load(GOLDEN / "oc_vit")
    with pytest.raises(CheckpointError, match=r"layer_scale True .*save the model as a vlm bundle"):
        bundle.save(tmp_path / "out", format="huggingface")
    assert list(tmp_path.iterdir()) == []
    bundle.save(tmp_path / "out", format="open_clip")
    with pytest.raises(CheckpointError, match="exists already"):
        bundle.save(tmp_path / "out", format="open_clip")


def test_refusals_list_everything():
    bundle = load(GOLDEN / "hf_siglip")
    vision = dataclasses.replace(bundle.config.vision, layer_scale=True, pre_norm=True)
    config = dataclasses.replace(bundle.config, vision=vision)
    with pytest.raises(
        CheckpointError, match=r"layer_scale True \(False\).*pre_norm True \(False\)"
    ):
        huggingface_config(config, bundle.tokenizer)
    with pytest.raises(CheckpointError, match=r"patch_bias True \(False\).*projection 'none'"):
        open_clip_config(config, bundle.tokenizer)
