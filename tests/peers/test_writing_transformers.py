"""What is written for models that transformers alone has is the same model there."""

import pathlib

import numpy as np
import pytest

from vlm.bundle import load

pytestmark = pytest.mark.peers
GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
NAMES = ["hf_naflex", "hf_chinese_clip", "hf_altclip", "hf_align", "hf_tipsv2", "hf_tipsv2_giant"]
NAMES += ["hf_aimv2", "hf_groupvit"]
TEXTS = ["a photo of a cat", "Two DOGS on the beach!", "naïve café 🙂", "very long " * 30, ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_ours_is_the_same_model_in_transformers(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = load(GOLDEN / name)
    ours.save(tmp_path / "out", format="huggingface")
    model, missing = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    missing["missing_keys"] = {
        name for name in missing["missing_keys"] if not name.endswith("num_batches_tracked")
    }
    assert not any(missing.values()), missing  # no parameter is new, and none is left over
    tips = "tips" in name  # whose processor is of tensors, and which embeds "" as 0 / 0
    backend = {} if tips else {"backend": "pil"}
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", **backend)
    # Not by the model's kind: that of NaFlex wants tokens which the small vocabulary does not have.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    rng = np.random.default_rng(1)
    raw = [rng.integers(0, 256, shape, np.uint8) for shape in ((90, 31, 3), (17, 44, 3))]
    texts = TEXTS[:-1] if tips else TEXTS
    words = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert np.array_equal(words["input_ids"].numpy(), ours.tokenizer(texts))
    if name == "hf_naflex":
        words.pop("attention_mask")
    with torch.no_grad():
        out = model.eval()(**words, **pixels(raw, return_tensors="pt"))
    z_image, z_text = ours.encode_image(raw), ours.encode_text(texts)
    assert np.abs(z_image - out.image_embeds.numpy()).max() < 3e-6
    assert np.abs(z_text - out.text_embeds.numpy()).max() < 3e-6
    logits = ours.logit_scale * z_image @ z_text.T + ours.logit_bias
    assert np.abs(logits - out.logits_per_image.numpy()).max() < 3e-5
