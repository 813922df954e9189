"""Models that vlm pushed to a Hub over loopback, loaded from it by transformers and open_clip."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.peers

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "weights"))

from hub_server import TOKEN  # noqa: E402
from hub_server import connected as connected  # noqa: E402  # fixtures
from hub_server import hub as hub  # noqa: E402
from small_clip import small_clip  # noqa: E402

from vlm.weights.vocabularies import clip_tokenizer  # noqa: E402

TEXTS = ["a photo of a cat", "two dogs in the snow"]


@pytest.fixture
def pushed(connected, monkeypatch):
    """Push a small model of CLIP's form, and return it with an image."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = small_clip(clip_tokenizer(77), 49_408, 77)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    image = Image.fromarray(pixels)
    return (
        lambda format: model.push_to_hub(f"me/{format}", format=format, licence="mit"),
        model,
        image,
    )


def unit(z):
    z = z.detach().numpy()
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_transformers(pushed, monkeypatch):
    transformers = pytest.importorskip("transformers")
    push, model, image = pushed
    push("huggingface")
    theirs = transformers.CLIPModel.from_pretrained("me/huggingface").eval()
    processor = transformers.AutoProcessor.from_pretrained("me/huggingface", backend="pil")
    inputs = processor(text=TEXTS, images=image, return_tensors="pt", padding="max_length")
    out = theirs(**inputs)
    np.testing.assert_allclose(unit(out.text_embeds), model.encode_text(TEXTS), atol=2e-6)
    np.testing.assert_allclose(unit(out.image_embeds), model.encode_image(image), atol=2e-6)
    classify = transformers.pipeline("zero-shot-image-classification", model="me/huggingface")
    assert {row["label"] for row in classify(image, candidate_labels=["cat", "dog"])} == {
        "cat",
        "dog",
    }


def test_open_clip(pushed):
    open_clip = pytest.importorskip("open_clip")
    push, model, image = pushed
    push("open_clip")
    theirs, preprocess = open_clip.create_model_from_pretrained("hf-hub:me/open_clip")
    theirs.eval()
    tokens = open_clip.get_tokenizer("hf-hub:me/open_clip")(TEXTS)
    np.testing.assert_allclose(
        unit(theirs.encode_text(tokens)), model.encode_text(TEXTS), atol=2e-6
    )
    np.testing.assert_allclose(
        unit(theirs.encode_image(preprocess(image)[None])), model.encode_image(image), atol=2e-6
    )
