"""ALIGN beside transformers: what is written for its AlignModel is the same model there."""

import pathlib

import numpy as np
import pytest

from vlm.bundle import load

pytestmark = pytest.mark.peers
GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
TEXTS = ["a photo of a cat", "Two DOGS on the beach!", "naïve café 🙂", "very long " * 30, ""]


def test_a_folder_of_ours_is_the_same_model_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = load(GOLDEN / "hf_align")
    ours.save(tmp_path / "out", format="huggingface")
    model, missing = transformers.AlignModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    counts = {name for name in missing["missing_keys"] if name.endswith("num_batches_tracked")}
    missing["missing_keys"] = set(missing["missing_keys"]) - counts
    assert not any(missing.values()), missing  # no parameter is new, and none is left over
    pixels = transformers.EfficientNetImageProcessorPil.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rng = np.random.default_rng(1)
    raw = [rng.integers(0, 256, shape, np.uint8) for shape in ((90, 31, 3), (17, 44, 3))]
    words = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert np.array_equal(words["input_ids"].numpy(), ours.tokenizer(TEXTS))
    with torch.no_grad():
        out = model.eval()(**words, **pixels(raw, return_tensors="pt"))
    z_image, z_text = ours.encode_image(raw), ours.encode_text(TEXTS)
    assert np.abs(z_image - out.image_embeds.numpy()).max() < 3e-6
    assert np.abs(z_text - out.text_embeds.numpy()).max() < 3e-6
    logits = ours.logit_scale * z_image @ z_text.T
    assert np.abs(logits - out.logits_per_image.numpy()).max() < 3e-5
