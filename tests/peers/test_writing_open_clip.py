"""open_clip itself builds what is written for it, loads it, and embeds the same.

The golden models are small: their encoders and towers stand in here for the large ones of the same
names, on both sides.
"""

import dataclasses
import functools
import pathlib
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from vlm.bundle import Bundle, load
from vlm.weights import text_encoders, timm

pytestmark = pytest.mark.peers
GOLDEN = pathlib.Path(__file__).parents[1] / "weights" / "golden"
TEXTS = ["a photo of a cat", "Two DOGS on the beach!", "naïve café 🙂", "very long " * 30, ""]
ROBERTA = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 34,
    "max_position_embeddings": 20, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
NLLB = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 16,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 44, "decoder_ffn_dim": 8,
    "max_position_embeddings": 1024, "scale_embedding": True,
}  # fmt: skip
ENCODERS = {
    "xlm-roberta-base": ("oc_xlm_roberta", "XLMRobertaConfig", ROBERTA, 18),
    "roberta-base": ("oc_xlm_roberta", "RobertaConfig", ROBERTA, 18),
    "facebook/nllb-200-distilled-600M": ("oc_nllb", "M2M100Config", NLLB, 1024),
}


@pytest.mark.parametrize("hub", ENCODERS)
def test_an_encoder_of_transformers_is_the_same_in_open_clip(hub, tmp_path, monkeypatch):
    hf_model = pytest.importorskip("open_clip.hf_model")
    transformers = pytest.importorskip("transformers")
    golden, kind, sizes, places = ENCODERS[hub]
    ours = load(GOLDEN / golden)
    encoder = dataclasses.replace(ours.config.text, context_length=places)
    monkeypatch.setitem(text_encoders.ENCODERS, hub, encoder)
    config = getattr(transformers, kind)(
        vocab_size=encoder.vocab_size, pad_token_id=text_encoders.PAD_ID, **sizes
    )
    config.save_pretrained(tmp_path / "hub" / hub)
    at_hand = hf_model.AutoConfig.from_pretrained(tmp_path / "hub" / hub)
    asked = mock.Mock(from_pretrained=mock.Mock(return_value=at_hand))
    monkeypatch.setattr(hf_model, "AutoConfig", asked)
    agrees(ours, tmp_path)
    asked.from_pretrained.assert_called_once_with(hub)


def test_a_vit_of_timms_is_the_same_in_open_clip(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    theirs = pytest.importorskip("timm")
    ours = load(GOLDEN / "oc_timm_clip")
    monkeypatch.setitem(timm.TOWERS, "vit_base_patch16_clip_224", ours.config.vision)
    small = functools.partial(
        theirs.create_model,
        img_size=28, patch_size=7, embed_dim=24, depth=2, num_heads=12, mlp_ratio=1.6,
    )  # fmt: skip
    with mock.patch.object(theirs, "create_model", small):
        agrees(ours, tmp_path)


def agrees(ours: Bundle, folder: pathlib.Path) -> None:
    """A model, written and opened by open_clip, which is strict about every tensor."""
    import open_clip
    import torch

    ours.save(folder / "out", format="open_clip")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / 'out'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder / 'out'}")(TEXTS)
    assert np.array_equal(tokens.numpy(), ours.tokenizer(TEXTS))
    rng = np.random.default_rng(1)
    raw = [rng.integers(0, 256, shape, np.uint8) for shape in ((90, 31, 3), (17, 44, 3))]
    pixels = torch.stack([transform(Image.fromarray(image)) for image in raw])
    with torch.no_grad():
        z_image = model.eval().encode_image(pixels, normalize=True).numpy()
        z_text = model.encode_text(tokens, normalize=True).numpy()
    assert np.abs(ours.encode_image(raw) - z_image).max() < 3e-6
    assert np.abs(ours.encode_text(TEXTS) - z_text).max() < 3e-6
